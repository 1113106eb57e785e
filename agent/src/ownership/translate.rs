//! What an engine's names for tiers and its untagged extra keys mean.

use baton_proto::block_hash::ExtraKey;
use baton_proto::control::v1::Tier;

use crate::engine::event::ExtraValue;

/// The tier of a medium. `None` where it has no known name, or lies with another engine.
pub(super) fn tier(medium: Option<&str>, locality: Option<&str>) -> Option<Tier> {
    if locality == Some("REMOTE") {
        return None;
    }
    match medium {
        None | Some("GPU") => Some(Tier::Gpu),
        Some("CPU") => Some(Tier::Host),
        Some("STORAGE") => Some(Tier::Disk),
        Some(_) => None,
    }
}

/// Gives an engine's untagged keys their meaning: the LoRA name comes first where there is one, pairs are
/// multimodal items, the text of a prompt's first block is its cache salt, bytes are opaque.
pub(super) fn extra_keys<'a>(
    values: &'a [ExtraValue],
    lora: Option<&'a str>,
    first: bool,
) -> Option<Vec<ExtraKey<'a>>> {
    let mut keys = Vec::with_capacity(values.len() + 1);
    let mut rest = values;
    if let Some(name) = lora {
        keys.push(ExtraKey::Lora(name));
        match rest.split_first() {
            Some((ExtraValue::Text(text), others)) if text == name => rest = others,
            // Versions that list no extra keys still name the adapter.
            None => {}
            Some(_) => return None,
        }
    }
    for value in rest {
        keys.push(match value {
            ExtraValue::Item(identifier, offset) => ExtraKey::Multimodal { identifier, offset: *offset },
            ExtraValue::Text(salt) if first => ExtraKey::Salt(salt),
            ExtraValue::Bytes(digest) => ExtraKey::Opaque(digest),
            // Text behind the first block is the multimodal key of a version that lists no offsets.
            ExtraValue::Text(_) | ExtraValue::Unknown => return None,
        });
    }
    Some(keys)
}

/// The keys of one of the blocks that make a larger one: `part` counts from 0. `None` where that cannot be told: a multimodal
/// item's extent is not known.
pub(super) fn part_keys<'a>(keys: &[ExtraKey<'a>], part: u32) -> Option<Vec<ExtraKey<'a>>> {
    let mut own = Vec::with_capacity(keys.len());
    for key in keys {
        match key {
            ExtraKey::Lora(name) => own.push(ExtraKey::Lora(name)),
            ExtraKey::Salt(salt) if part == 0 => own.push(ExtraKey::Salt(salt)),
            ExtraKey::Salt(_) => {}
            ExtraKey::Multimodal { .. } | ExtraKey::Opaque(_) => return None,
        }
    }
    Some(own)
}
