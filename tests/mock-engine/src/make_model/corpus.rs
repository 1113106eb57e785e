//! The text that the tokenizer is trained on: prose, code and other scripts, generated from word lists with a fixed seed.

/// Documents of the corpus.
const DOCUMENTS: usize = 240;

const NOUNS: &str = "time year people way day man thing woman life child world school state family student group country \
problem hand part place case week company system program question work government number night point home water room \
mother area money story fact month lot right study book eye job word business issue side kind head house service friend \
father power hour game line end member law car city community name president team minute idea body information back \
parent face level office door health person art war history party result change morning reason research girl guy moment \
air teacher force education engine server cache block memory network request token prompt model layer index store agent \
router link cable bridge river mountain forest garden kitchen market village harbour island desert ocean storm winter \
summer autumn spring weather cloud thunder lightning shadow light candle mirror window table chair carpet blanket pillow \
bottle basket hammer needle thread cotton leather copper silver iron stone marble wood paper letter envelope journal \
newspaper magazine library museum theatre concert orchestra guitar piano violin trumpet drum melody rhythm silence \
language grammar sentence paragraph chapter translation alphabet dictionary algorithm compiler parameter function \
variable database protocol connection certificate address packet buffer queue thread process scheduler deadline latency \
bandwidth throughput measurement experiment hypothesis evidence conclusion argument discussion agreement contract budget \
account payment invoice customer supplier factory machine vehicle airplane station platform passenger luggage passport \
border territory population election parliament minister committee decision policy strategy campaign victory defeat \
soldier captain officer hospital doctor nurse medicine disease treatment recovery accident insurance captain breakfast \
dinner cheese butter bread coffee sugar pepper onion potato tomato apple orange lemon cherry chocolate recipe flavour";

const VERBS: &str = "ask become begin call come feel find get give go hear help keep know leave let like live look make mean \
move need play put run say see seem show start take talk tell think try turn use want work write read learn change follow \
stop create speak spend grow open walk win teach offer remember consider appear buy serve die send build stay fall cut \
reach kill raise pass sell decide return explain hope develop carry break receive agree support hit produce eat cover \
catch draw choose cause require report measure compare compute transfer schedule allocate release evict prefer answer \
repeat describe discover explore imagine improve include increase introduce invite involve maintain manage mention notice \
observe obtain operate organise prepare present prevent protect prove provide publish push record reduce refer reflect \
refuse relate remain remove replace represent reveal search select separate share shout sleep solve stand steal suggest \
suppose surprise survive touch train travel understand visit wait wake warn wash watch wonder worry";

const ADJECTIVES: &str = "good new first last long great little own other old right big high different small large next early \
young important few public bad same able local sure free real clear certain personal open red difficult available likely \
short single medical current wrong private past foreign fine common poor natural significant similar hot dead central happy \
serious ready simple left physical general environmental financial blue democratic dark various entire close legal religious \
cold final main green nice huge popular traditional cultural quiet gentle bright heavy narrow ancient modern careful \
dangerous delicate distant empty enormous familiar famous fragile generous honest invisible patient peaceful pleasant \
practical precise proud rapid rare remote rough round sharp silent smooth soft strange strong sudden sweet tall thick thin \
tiny tired unusual useful valuable warm weak wide wild wise wonderful wooden";

const ADVERBS: &str = "slowly quickly often never always sometimes usually almost nearly together alone again once soon later \
already perhaps certainly probably carefully quietly suddenly finally clearly exactly simply really especially recently \
directly immediately gradually however therefore meanwhile otherwise instead besides indeed";

const NAMES: &str = "Alice Bob Carol David Elena Farid Grace Hassan Ingrid Jonas Keiko Liam Maria Noor Olga Pedro Quinn Ravi \
Sofia Tomas Uma Viktor Wei Xenia Yusuf Zoe London Paris Berlin Madrid Rome Vienna Prague Cairo Lagos Nairobi Delhi Tokyo Seoul \
Sydney Toronto Chicago Boston Lima Monday Tuesday Wednesday Thursday Friday Saturday Sunday January February March April \
June July August September October November December";

const SENTENCES: &[&str] = &[
    "The {a} {n} {v}s the {n} {d}, and {N} does not {v} it.",
    "{N} wanted to {v} the {a} {n} before the {n} could {v}.",
    "If you {v} a {n}, you should {d} {v} its {n}.",
    "There are {#} {n}s in the {n}, but only {#} of them are {a}.",
    "When did {N} {v} the {n} of {N}? It was in {#}.",
    "\"We can't {v} this {n},\" said {N}, \"because it's too {a}.\"",
    "Please {v} the following {n} and explain why it is {a}.",
    "In my opinion, the {n} isn't {a} enough; we'll have to {v} another {n}.",
    "What is the difference between a {n} and a {a} {n}?",
    "They've {v}ed the {n} {d}, so that every {n} {v}s in {#} seconds.",
    "{N} and {N} were {v}ing near the {n} while the {n} was {a}.",
    "First, {v} the {n}. Second, {v} the {a} {n}. Finally, {v} everything {d}.",
    "The {n} ({#}%) is {a}er than the {n} of {N}'s {n}.",
    "Nobody knows whether the {a} {n} will {v} or {v}.",
    "It would have been {a} if they had {v}ed their {n} with the {n}.",
    "Could you {v} me about the {n} that I'd {v}ed on {N}?",
    "As an assistant, I'm happy to help you {v} your {n}, step by step.",
    "You are a {a} assistant. Answer {d} and use at most {#} words.",
];

const CODE: &[&str] = &[
    "def {v}_{n}(self, {n}: int, {n}_{n}: str = \"{a}\") -> None:\n    \"\"\"{V} the {n}.\"\"\"\n    for {n} in range({#}):\n        if {n} is not None:\n            return self.{n}[{n}]\n",
    "fn {v}_{n}(&mut self, {n}: &str) -> Result<u64, Error> {\n    let mut {n} = Vec::with_capacity({#});\n    match self.{n}.get({n}) {\n        Some({n}) => Ok({n}),\n        None => Err(Error::{V}),\n    }\n}\n",
    "async function {v}{V}({n}, {n}) {\n  const {n} = await this.{n}.{v}({n});\n  return { \"{n}\": {n}.length, \"{a}\": true, \"id\": {#} };\n}\n",
    "SELECT {n}, COUNT(*) FROM {n}s WHERE {n}_id = {#} GROUP BY {n} ORDER BY {n} DESC LIMIT {#};\n",
    "{\"name\": \"{v}_{n}\", \"arguments\": {\"{n}\": \"{a} {n}\", \"count\": {#}, \"{a}\": false, \"items\": [{#}, {#}, null]}}\n",
    "# {V} the {n}\nexport {n}=\"/usr/local/{n}/{n}.conf\"\nfor f in *.txt; do\n    {v} --{n} \"$f\" > {n}.log 2>&1 || exit 1\ndone\n",
    "impl {V} for {V}{V} {\n    type Output = Self;\n    // {V} {d}.\n    pub fn new() -> Self { Self { {n}: {#}.0, {n}: None } }\n}\n",
    "| {n} | {n} | {a} |\n|---|---|---|\n| {#} | {#}.{#} | {N} |\n\n## {V} {n}\n\n- {a} {n}: `{v}_{n}`\n- **{n}**: https://example.com/{n}/{n}?id={#}\n",
];

const SCRIPTS: &[&str] = &[
    "Der schnelle braune Fuchs springt über den faulen Hund; Äpfel, Öl und Übermut gehören dazu, natürlich auch Straße.",
    "Le cœur déçu mais l'âme plutôt naïve, Louÿs rêva de crapaüter en canoë au delà des îles, près du mälström.",
    "El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia y frío; ¿cuándo volverá el señor a la mañana?",
    "Съешь ещё этих мягких французских булок, да выпей чаю. Модель отвечает на вопрос быстро и правильно.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. Η ταχύτητα του δικτύου είναι σημαντική.",
    "敏捷的棕色狐狸跳过了懒狗。请用中文回答这个问题，谢谢。我们今天学习机器学习和自然语言处理。",
    "いろはにほへと ちりぬるを。今日はとても良い天気ですね。モデルは質問に答えます。",
    "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다. 안녕하세요, 반갑습니다.",
    "صِف خَلقَ خَودِ كَمِثلِ الشَمسِ إِذ بَزَغَت. مرحبا بك في عالم اللغات.",
    "नमस्ते दुनिया, यह एक परीक्षण वाक्य है। कृपया इस प्रश्न का उत्तर दें।",
    "Pchnąć w tę łódź jeża lub ośm skrzyń fig. Zażółć gęślą jaźń.",
    "Pijamalı hasta yağız şoföre çabucak güvendi. İstanbul'da güneşli bir gün.",
    "Emoji: 😀 😂 🚀 🔥 ❤️ 👍 🎉 🤔 ✅ ❌ ⚠️ 🌍 — “quotes” ‘single’ … ≤ ≥ ≠ ± × ÷ ∑ √ π ∞ € £ ¥ © ® ™ °C µs →",
];

/// Numbers that look random and are always the same.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % bound as u64) as usize
    }

    /// One of the items; the first ones come more often, as words do.
    fn word<'a>(&mut self, words: &[&'a str]) -> &'a str {
        let at = self.below(words.len()).min(self.below(words.len()));
        words[at]
    }
}

struct Words {
    nouns: Vec<&'static str>,
    verbs: Vec<&'static str>,
    adjectives: Vec<&'static str>,
    adverbs: Vec<&'static str>,
    names: Vec<&'static str>,
}

/// The corpus.
pub(super) fn documents() -> Vec<String> {
    let split = |words: &'static str| words.split_whitespace().collect();
    let words = Words {
        nouns: split(NOUNS),
        verbs: split(VERBS),
        adjectives: split(ADJECTIVES),
        adverbs: split(ADVERBS),
        names: split(NAMES),
    };
    let mut random = Random(2026);
    (0..DOCUMENTS).map(|number| document(number, &words, &mut random)).collect()
}

fn document(number: usize, words: &Words, random: &mut Random) -> String {
    let mut text = String::new();
    for _ in 0..3 {
        for _ in 0..8 {
            fill(SENTENCES[random.below(SENTENCES.len())], words, random, &mut text);
            text.push(' ');
        }
        text.push_str("\n\n");
    }
    for _ in 0..3 {
        fill(CODE[random.below(CODE.len())], words, random, &mut text);
        text.push('\n');
    }
    text.push_str(SCRIPTS[number % SCRIPTS.len()]);
    text.push('\n');
    text
}

/// Appends a pattern with words for its places.
fn fill(pattern: &str, words: &Words, random: &mut Random, into: &mut String) {
    let mut rest = pattern;
    while let Some(at) = rest.find('{') {
        into.push_str(&rest[..at]);
        let place = rest.get(at + 1..at + 3).unwrap_or_default();
        match place {
            "n}" => into.push_str(random.word(&words.nouns)),
            "v}" => into.push_str(random.word(&words.verbs)),
            "a}" => into.push_str(random.word(&words.adjectives)),
            "d}" => into.push_str(random.word(&words.adverbs)),
            "N}" => into.push_str(random.word(&words.names)),
            "V}" => {
                let verb = random.word(&words.verbs);
                into.push_str(&verb[..1].to_uppercase());
                into.push_str(&verb[1..]);
            }
            "#}" => {
                let bound = [10, 100, 1000, 3000, 100_000][random.below(5)];
                into.push_str(&random.below(bound).to_string());
            }
            _ => {
                into.push('{');
                rest = &rest[at + 1..];
                continue;
            }
        }
        rest = &rest[at + 3..];
    }
    into.push_str(rest);
}
