//! Fleet files: the examples, and what is said of bad ones.

use std::path::Path;

use baton_sim::fleet::{Control, Fleet, FleetError, Role, Split};

fn folder() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../benches/fleets")
}

#[test]
fn examples_are_fleets() {
    let mut names = Vec::new();
    for entry in folder().read_dir().expect("the examples") {
        let path = entry.expect("an entry").path();
        let fleet = Fleet::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert_eq!(fleet.links.choices, [10.0, 25.0, 100.0, 400.0]);
        assert!(fleet.slo.is_some());
        assert!(fleet.members().iter().all(|member| member.host < fleet.hosts()));
        names.push((path.file_name().expect("a name").to_string_lossy().into_owned(), fleet.len()));
    }
    names.sort();
    let expected =
        [("70b-h100x4-x8.toml", 8), ("8b-h100x16.toml", 16), ("8b-h100x8.toml", 8), ("8b-l40sx8.toml", 8)];
    assert_eq!(names, expected.map(|(name, engines)| (name.to_owned(), engines)));
}

const GOOD: &str = r#"
name = "n"
model = "8B"
[[engines]]
gpu = "H100"
count = 4
per_host = 2
kv_tokens = 100000
[links]
gbit = 10
"#;

#[test]
fn defaults_and_the_form_that_the_documentation_shows() {
    let fleet = Fleet::parse(GOOD).expect("a fleet");
    assert_eq!((fleet.len(), fleet.hosts(), fleet.engines[0].role), (4, 2, Role::Both));
    assert_eq!(fleet.widths().host, 10e9 / 8.0 * 0.85);
    assert_eq!(fleet.with_gbit(100.0).widths().host, 100e9 / 8.0 * 0.85);
    let source = include_str!("../src/fleet/mod.rs");
    let shown = source
        .lines()
        .skip_while(|line| *line != "//! ```toml")
        .skip(1)
        .take_while(|line| *line != "//! ```");
    let shown: String = shown.map(|line| line.trim_start_matches("//!").to_owned() + "\n").collect();
    let fleet = Fleet::parse(&shown).expect("what the documentation shows");
    assert_eq!((fleet.background.len(), fleet.outages.len(), fleet.cards.len()), (1, 1, 1));
    // Fields that are shown with their defaults.
    assert_eq!(fleet.control, Control::default());
    let bare = Fleet::parse(GOOD).expect("a fleet");
    assert_eq!((fleet.engines[0].host_kv_tokens, bare.engines[0].host_kv_tokens), (0, 0));
    assert_eq!(fleet.engines[0].host_gbit, bare.engines[0].host_gbit);
}

#[test]
fn splits() {
    let fleet = Fleet::parse(GOOD).expect("a fleet");
    let split: Split = "1p3D".parse().expect("a split");
    let fleet = fleet.with_split(split).expect("four engines");
    let roles: Vec<Role> = fleet.members().iter().map(|member| member.role).collect();
    assert_eq!(roles, [Role::Prefill, Role::Decode, Role::Decode, Role::Decode]);
    for bad in ["", "3", "P5D", "0P4D", "3P", "aPbD", "3P5D2"] {
        assert!(bad.parse::<Split>().is_err(), "{bad}");
    }
    let error = fleet.with_split("2P3D".parse().expect("a split")).expect_err("five engines");
    assert_eq!(error.to_string(), "2P3D is 5 engines, but the fleet has 4; give a split of 4");
}

#[test]
fn each_fault_names_its_field_and_the_mend() {
    let cases = [
        ("gpu = \"H100\"", "gpu = \"H1\"", "engines[0].gpu", "give `constants`, or one of: 8B on H100"),
        ("count = 4", "count = 0", "engines[0].count", "at least 1"),
        ("count = 4", "count = 4000", "engines", "at most 1000"),
        ("per_host = 2", "per_host = 0", "engines[0].per_host", "at least 1"),
        ("kv_tokens = 100000", "kv_tokens = 12", "engines[0].kv_tokens", "GPU KV cache size"),
        ("per_host = 2", "max_num_seqs = 9000", "engines[0].max_num_batched_tokens", "lower max_num_seqs"),
        ("gbit = 10", "gbit = -10", "links.gbit", "above 0"),
        ("gbit = 10", "gbit = 10\nefficiency = 1.5", "links.efficiency", "between 0 and 1"),
        ("gbit = 10", "gbit = 10\nchoices = [1, nan]", "links.choices[1]", "above 0"),
        ("gbit = 10", "gbit = 10\n[slo]\nttft_ms = 0\ntpot_ms = 1", "slo.ttft_ms", "above 0"),
        (
            "gbit = 10",
            "gbit = 10\n[[background]]\nfrom = 0\nto = 2\ngbit = 1",
            "background[0].to",
            "from 0 to 1",
        ),
        ("per_host = 2", "per_host = 2\nhost_gbit = 0", "engines[0].host_gbit", "above 0"),
        (
            "gbit = 10",
            "gbit = 10\n[control]\nmax_engine_requests = 0",
            "control.max_engine_requests",
            "above 0",
        ),
        (
            "gbit = 10",
            "gbit = 10\n[[outages]]\nengine = 4\nfrom_seconds = 1",
            "outages[0].engine",
            "from 0 to 3",
        ),
        (
            "gbit = 10",
            "gbit = 10\n[[outages]]\nengine = 1\nfrom_seconds = 5\nuntil_seconds = 5",
            "outages[0].until_seconds",
            "after from_seconds",
        ),
        (
            "gbit = 10",
            "gbit = 10\n[[outages]]\nengine = 1\nfrom_seconds = 5\n[[outages]]\nengine = 1\nfrom_seconds = 9",
            "outages[1].from_seconds",
            "one table for each time",
        ),
        (
            "gbit = 10",
            "gbit = 10\n[[cards]]\nhost = 2\nfrom_seconds = 1\ngbit = 1",
            "cards[0].host",
            "from 0 to 1",
        ),
        (
            "gbit = 10",
            "gbit = 10\n[[cards]]\nhost = 1\nfrom_seconds = 1\ngbit = -1",
            "cards[0].gbit",
            "0 or more",
        ),
        (
            "per_host = 2",
            "constants = { a = 1, b = 1, c = -1, d = 1, e = 0, f = 0, kv_kib = 1 }",
            "engines[0].constants.c",
            "0 or more",
        ),
    ];
    for (good, bad, expected, mend) in cases {
        let error = Fleet::parse(&GOOD.replacen(good, bad, 1)).expect_err(bad);
        let FleetError::Field { field, .. } = &error else { panic!("{bad}: {error}") };
        assert_eq!(field, expected, "{bad}");
        assert!(error.to_string().contains(mend), "{bad}: {error}");
    }
    for (good, bad, named) in [
        ("gbit = 10", "gbits = 10", "gbits"),
        ("gbit = 10", "rtt_us = 1", "gbit"),
        ("count = 4", "count = \"x\"", "count"),
    ] {
        let error = Fleet::parse(&GOOD.replacen(good, bad, 1)).expect_err(bad).to_string();
        assert!(error.contains(named), "{bad}: {error}");
    }
    assert!(Fleet::read(Path::new("/nowhere")).expect_err("no file").to_string().starts_with("/nowhere: "));
}
