//! A mock of a vLLM server, for demos, CI and benches.
//!
//! It speaks vLLM's HTTP, publishes vLLM's KV events, and has Baton's connector inside. Its KV cache is real bytes in shared memory,
//! paged, with prefix caching and eviction as in vLLM; only the model is a stand-in: KV bytes follow from the tokens, and the
//! next token follows from every KV byte of the sequence. What a fleet of these engines answers is therefore right exactly
//! if every byte of KV arrived where it should. Time passes as a model of a real engine says.
//!
//! | module | what |
//! |---|---|
//! | [`scheduler`], [`block_pool`], [`request`] | the pure core: batching, paging, prefix cache |
//! | [`model`], [`kv_memory`], [`vocabulary`], [`timing`] | the stand-in for a model on a GPU |
//! | [`engine`] | the loop that runs them on real time |
//! | [`connector`] | the KV connector, towards the agent |
//! | [`events`] | KV events |
//! | [`http`], [`tokenizer`], [`fast_bpe`], [`detokenize`], [`chat`], [`metrics`] | the API server |
//! | [`make_model`] | a model folder with a tokenizer and without weights |
//! | [`server`] | all of it as one process |

pub mod block_pool;
pub mod chat;
pub mod connector;
pub mod detokenize;
pub mod engine;
pub mod events;
pub mod fast_bpe;
pub mod hashing;
pub mod http;
pub mod kv_memory;
pub mod make_model;
pub mod metrics;
pub mod model;
pub mod request;
pub mod scheduler;
pub mod server;
pub mod timing;
pub mod tokenizer;
pub mod vocabulary;
