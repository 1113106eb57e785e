//! What gather, scatter, checksums and fp8 packing have to do, on every backend: the CPU reference always, and the
//! device where there is one.

mod backend;
mod checksum;
mod fp8;
mod memory;
mod paged;
