//! Token ids against those of vLLM 0.32's own renderer, recorded by `corpus/record.py`.

use std::collections::BTreeMap;
use std::path::Path;

use baton_coordinator::config::ModelConfig;
use baton_coordinator::dispatch::Endpoint;
use baton_coordinator::http::{RequestBody, token_ids};
use baton_coordinator::tokenizer::Model;
use serde_json::Value;

#[derive(serde::Deserialize)]
struct Case {
    model: String,
    kind: String,
    case: String,
    request: Value,
    /// `None` where vLLM refuses the request.
    ids: Option<Vec<u32>>,
}

#[test]
fn ids_equal_vllms_own() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    let cases: Vec<Case> =
        serde_json::from_slice(&std::fs::read(corpus.join("cases.json")).unwrap()).unwrap();
    let mut models = BTreeMap::new();
    let mut failures = Vec::new();
    for case in &cases {
        let model = models.entry(&case.model).or_insert_with(|| {
            let path = corpus.join("models").join(&case.model);
            let model = Model::load(&ModelConfig { name: case.model.clone(), path, slo: Default::default() })
                .unwrap();
            assert!(model.caches_words());
            model
        });
        let endpoint = match case.kind.as_str() {
            "chat" => Endpoint::Chat,
            _ => Endpoint::Completions,
        };
        let body = RequestBody::parse(case.request.to_string().into()).unwrap();
        let ours = token_ids(model, endpoint, &body);
        let equal = match (&ours, &case.ids) {
            (Ok(ours), Some(theirs)) => ours == theirs,
            (Err(_), Some(_)) => false,
            // What vLLM refuses is its own affair: it will say so.
            (_, None) => true,
        };
        if !equal {
            let text = |ids: &[u32]| {
                let texts = model.token_texts(ids).into_iter().flatten();
                texts.collect::<String>().replace('Ġ', " ").replace('Ċ', "\n")
            };
            let ours = ours.map_or_else(|error| format!("{error:?}"), |ids| text(&ids));
            let theirs = case.ids.as_deref().map(text);
            failures.push(format!(
                "{} / {} / {}:\n--- ours\n{ours}\n--- vLLM's\n{}\n",
                case.model,
                case.kind,
                case.case,
                theirs.unwrap_or_default()
            ));
        }
    }
    assert!(cases.iter().filter(|case| case.ids.is_some()).count() > 100, "the corpus is there");
    assert!(failures.is_empty(), "{} of {} differ:\n{}", failures.len(), cases.len(), failures.join("\n"));
}
