//! The whole suite on mock engines, on one fleet.

use baton_e2e::bed::Bed;
use baton_e2e::fleets;
use baton_e2e::report::Report;
use baton_e2e::scenarios::Scenario;

#[tokio::test(flavor = "multi_thread")]
async fn every_acceptance_line_holds_on_mock_engines() {
    let (spec, mut scale) = fleets::mock();
    // Timed comparisons belong to `baton-e2e`, on a machine that does nothing else.
    let scenarios =
        Scenario::ALL.into_iter().filter(|scenario| ![Scenario::Ttft, Scenario::Sim].contains(scenario));
    scale.longest = 2000;
    let mut bed = Bed::start(spec, scale).await.expect("the fleet starts");
    let mut report = Report::default();
    for scenario in scenarios {
        report.lines.extend(scenario.run(&mut bed).await);
    }
    let stopped = bed.shutdown().await;
    let failed: Vec<String> =
        report.lines.iter().filter(|line| !line.ok).map(|line| line.to_string()).collect();
    assert!(report.ok(), "\n{}", failed.join("\n"));
    stopped.expect("the fleet stops in order");
}
