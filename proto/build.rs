//! Compiles the control-plane service definitions.

fn main() -> std::io::Result<()> {
    tonic_prost_build::configure()
        .bytes(".")
        .compile_protos(&["proto/baton/control/v1/control.proto"], &["proto"])
}
