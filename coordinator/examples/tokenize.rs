use baton_coordinator::config::ModelConfig;
use baton_coordinator::tokenizer::Model;
use std::time::Instant;
fn main() {
    let path = std::env::args().nth(1).unwrap();
    let model = Model::load(&ModelConfig { name: "m".into(), path: path.into() }).unwrap();
    let words: Vec<&str> = "river window quiet engine copper morning letter garden bridge winter stone candle market forest signal paper harbor thunder little orange silver people mountain shadow number kitchen travel doctor the of and with without before between under across because simple bright early heavy open second carried".split(' ').collect();
    let mut seed = 1u64;
    let mut times = vec![];
    let mut n = 0;
    for _ in 0..400 {
        let mut text = String::new();
        while text.len() < 8192 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            text.push_str(words[(seed >> 33) as usize % words.len()]);
            text.push(' ');
        }
        let t = Instant::now();
        n = model.encode(&text, true).unwrap().len();
        times.push(t.elapsed().as_micros());
    }
    times.sort();
    println!("{n} tokens; p50 {} us p90 {} us", times[200], times[360]);
}
