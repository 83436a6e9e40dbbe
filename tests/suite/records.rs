//! Burn's records of decoders: they come back as they were, and those of another plan are refused.

use burn::module::Module;
use burn::record::{BinBytesRecorder, BytesRecorder, FullPrecisionSettings, NamedMpkBytesRecorder};
use fusedkv::backend::{Flex, FlexDevice};
use fusedkv::decoder::{DecoderRecord, PlanRecord, RecordError};
use fusedkv::{FusedKvDecoder, KvPlan, Logits, TokenBatch};
use proptest::prelude::*;

use crate::models::{VOCAB, fixed, model, plans, values};

fn logits(model: &FusedKvDecoder<Flex>) -> Vec<f64> {
    let tokens = TokenBatch::from_rows(&[vec![1, 2, 3]], VOCAB, &FlexDevice).unwrap();
    let mut cache = model.new_cache(1, 3).unwrap();
    let logits = model.forward_cached(tokens, &mut cache, Logits::All);
    values(&logits.unwrap())
}

/// A record as it is read back from bytes.
fn through<R: BytesRecorder<Flex, Vec<u8>>>(
    recorder: &R,
    record: DecoderRecord<Flex>,
) -> DecoderRecord<Flex> {
    let bytes = recorder.record(record, ()).unwrap();
    recorder.load(bytes, &FlexDevice).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_record_is_of_one_plan(
        own in prop::sample::select(plans(4)),
        other in prop::sample::select(plans(4)),
        format in 0..3,
    ) {
        let recorded = model::<Flex>(&fixed(other.clone()), 1);
        let expected = logits(&recorded);
        let mut record = recorded.into_record();
        match format {
            0 => {}
            1 => record = through(&NamedMpkBytesRecorder::<FullPrecisionSettings>::default(), record),
            _ => record = through(&BinBytesRecorder::<FullPrecisionSettings>::default(), record),
        }
        let decoder = model::<Flex>(&fixed(own.clone()), 2);
        let layers = |plan: &KvPlan| plan.resolve(4).unwrap().layers().to_vec();
        let (own, other) = (layers(&own), layers(&other));
        match own.iter().zip(&other).position(|(a, b)| a != b) {
            None => prop_assert_eq!(logits(&decoder.try_load_record(record).unwrap()), expected),
            Some(layer) => prop_assert_eq!(
                decoder.try_load_record(record).unwrap_err(),
                RecordError::Plan {
                    layer,
                    record: Box::new(other[layer].clone()),
                    decoder: Box::new(own[layer].clone()),
                }
            ),
        }
    }
}

#[test]
#[should_panic(expected = "layer 2 of the record has keys and values of its own")]
fn burns_own_loading_refuses_it_too() {
    let record = model::<Flex>(&fixed(KvPlan::Standard), 1).into_record();
    let plan = KvPlan::FusedKv { storage_layers: 2 };
    let _ = model::<Flex>(&fixed(plan), 1).load_record(record);
}

#[test]
fn another_depth_is_refused() {
    let mut config = fixed(KvPlan::Standard);
    let record = model::<Flex>(&config, 1).into_record();
    config.n_layers = 5;
    let error = model::<Flex>(&config, 1).try_load_record(record);
    let (record, decoder) = (4, 5);
    assert_eq!(error.unwrap_err(), RecordError::Depth { record, decoder });
}

/// As written before records knew their plan.
#[test]
fn records_without_a_plan_are_told_apart_by_their_parameters() {
    let without_plan = |plan| {
        let mut record = model::<Flex>(&fixed(plan), 1).into_record();
        record.plan = PlanRecord::default();
        record
    };
    let fused = KvPlan::FusedKv { storage_layers: 2 };
    let decoder = || model::<Flex>(&fixed(fused.clone()), 2);
    let expected = logits(&model(&fixed(fused.clone()), 1));
    let loaded = decoder().try_load_record(without_plan(fused.clone()));
    assert_eq!(logits(&loaded.unwrap()), expected);
    for (plan, parameter, in_record) in [
        (KvPlan::Standard, "layers.2.self_attn.k_proj", true),
        (
            KvPlan::FusedKv { storage_layers: 3 },
            "layers.2.self_attn.k_proj",
            true,
        ),
        (
            KvPlan::Yoco { storage_layers: 2 },
            "layers.2.self_attn.kv_fusion.key_weight",
            false,
        ),
    ] {
        let error = decoder().try_load_record(without_plan(plan)).unwrap_err();
        let parameter = parameter.to_owned();
        assert_eq!(
            error,
            RecordError::Parameter {
                parameter,
                in_record
            }
        );
    }
}
