//! KV that is to be pulled as fp8.

use baton_proto::connector::{HeadSpan, Heads, Piece};

use super::*;

#[test]
fn kv_is_asked_for_packed_of_engines_that_can_take_it_and_others_are_refused() {
    // Four values of one head: four codes and a scale.
    let with = |dtype: &str, heads| {
        let span = HeadSpan { start: 0, head_stride: 8, dims: vec![], len: 8 };
        Layout {
            facts: BTreeMap::from([("dtype".into(), dtype.into())]),
            pieces: vec![Piece { storage: 0, offset: 0, stride: 8, len: 8 }],
            heads: Some(Heads { total: 1, count: 1, spans: vec![span] }).filter(|_| heads),
            ..layout(0)
        }
    };
    let attach = |layout, dtype| {
        let mut bed = Bed::pulling_as(dtype);
        bed.attach("i", SCHEDULER, Side::Scheduler, 1);
        bed.input(Input::Connected(worker(0)));
        bed.say(worker(0), hello("i", Side::Worker(0), 1));
        bed.say(worker(0), ToAgent::Layout(layout));
        bed.input(Input::Mapped(worker(0), Mapped(Ok(Arc::new(FakeMemory)))));
        bed
    };
    for (layout, why) in [
        (with("float16", true), "its dtype is \"float16\", and \"bfloat16\" alone is packed"),
        (with("bfloat16", false), "its heads cannot be told apart"),
    ] {
        let mut bed = attach(layout.clone(), WireDtype::Fp8);
        let refusal = bed.sent().pop();
        let Some((_, ToConnector::Refused { reason })) = refusal else { panic!("{layout:?}: {refusal:?}") };
        assert!(reason.starts_with("transfer.wire_dtype = \"fp8\""), "{reason}");
        assert!(
            reason.contains(why) && reason.ends_with("leave the setting out for this engine"),
            "{reason}"
        );
        assert!(!bed.core.attachment().can_transfer);
        // Such an engine is welcome where nothing is packed.
        let attachment = attach(layout, WireDtype::AsStored).core.attachment();
        assert_eq!((attachment.block_bytes, attachment.wire_block_bytes), (8, 8));
    }
    for (dtype, wire_block_bytes) in [(WireDtype::Fp8, 4 + 4), (WireDtype::AsStored, 8)] {
        let mut bed = attach(with("bfloat16", true), dtype);
        let attachment = bed.core.attachment();
        assert_eq!((attachment.block_bytes, attachment.wire_block_bytes), (8, wire_block_bytes));
        bed.done.clear();
        bed.pull(1, 0, vec![3], 0, BLOCK);
        let asked = bed.done.iter().find_map(|action| match action {
            Action::Pull(_, request, ..) => Some(request.dtype),
            _ => None,
        });
        assert_eq!(asked, Some(dtype));
    }
}
