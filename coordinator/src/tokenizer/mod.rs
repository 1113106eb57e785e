//! From a request to the token ids that its engine will see.
//!
//! The ids equal those of vLLM 0.32: its validation, its rebuilding of messages, transformers' way with the chat template,
//! and the model's own `tokenizer.json`. Where that cannot be known (images, truncation, an engine that renders in
//! code of its own) the prompt counts as unknown. Nothing here ever fails a request: the engine is the judge.

pub mod agreement;
mod content_format;
mod messages;
mod model;
mod prefixes;
mod python;
mod template;
#[cfg(test)]
mod testing;
mod words;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Semaphore;

pub use self::model::{Model, ModelError, Text};
pub use self::prefixes::Tokens;
pub use self::template::Chat;
use crate::config::ModelConfig;

/// Why a prompt's tokens are not known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RenderError {
    /// They depend on something that is not mirrored; one of a fixed set of words.
    #[error("the prompt cannot be tokenised here: {0}")]
    Unknown(&'static str),
    /// The engine will refuse the request, too.
    #[error("{0}")]
    Refused(String),
    /// The chat template failed.
    #[error("{0}")]
    Template(String),
}

impl RenderError {
    /// A word for the metrics.
    pub fn word(&self) -> &'static str {
        match self {
            RenderError::Unknown(word) => word,
            RenderError::Refused(_) => "malformed",
            RenderError::Template(_) => "template_error",
        }
    }
}

/// Texts up to this many bytes are handled where they are; a longer one takes long enough (0.1 to 0.2 ms a KiB)
/// to hold up other requests, and goes to a thread of its own.
const INLINE_BYTES: usize = 1 << 10;
/// The same for models whose words come from a cache (some 0.02 ms a KiB).
const INLINE_BYTES_CACHED: usize = 16 << 10;

/// All models, and the threads that tokenise for them.
pub struct Models {
    models: BTreeMap<String, Arc<Model>>,
    threads: Arc<Semaphore>,
    queued: Arc<AtomicUsize>,
    queue: usize,
}

impl Models {
    /// Loads every model. At most `queue` texts are handled or wait at any time.
    pub fn load(configs: &[ModelConfig], queue: usize) -> Result<Self, ModelError> {
        let models = configs
            .iter()
            .map(|config| Ok((config.name.clone(), Arc::new(Model::load(config)?))))
            .collect::<Result<_, _>>()?;
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Ok(Self { models, threads: Arc::new(Semaphore::new(threads)), queued: Arc::default(), queue })
    }

    /// The model of this name.
    pub fn get(&self, name: &str) -> Option<&Arc<Model>> {
        self.models.get(name)
    }

    /// All models, in order of their names.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Model>> {
        self.models.values()
    }

    /// Does the work of tokenising about `bytes`: here, or on a thread where that takes long.
    pub async fn run<T: Send + 'static>(
        &self,
        model: &Model,
        bytes: usize,
        work: impl FnOnce() -> Result<T, RenderError> + Send + 'static,
    ) -> Result<T, RenderError> {
        let inline = if model.caches_words() { INLINE_BYTES_CACHED } else { INLINE_BYTES };
        if bytes <= inline {
            return work();
        }
        let _place = Place::take(&self.queued, self.queue).ok_or(RenderError::Unknown("queue_full"))?;
        let permit = self.threads.clone().acquire_owned().await;
        let done = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            work()
        });
        done.await.unwrap_or(Err(RenderError::Unknown("tokenizer_failed")))
    }
}

/// A place in the queue; free again when dropped.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(queued: &Arc<AtomicUsize>, queue: usize) -> Option<Self> {
        let place = Self(queued.clone());
        // Dropping the place takes the count back.
        (queued.fetch_add(1, Ordering::Relaxed) < queue).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
