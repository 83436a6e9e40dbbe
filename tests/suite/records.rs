//! Burn's records of decoders: they come back as they were, and those of another plan are refused; so
//! does what else Burn can do to a module leave a decoder what it is.

use std::path::Path;

use burn::module::Module;
use burn::record::{BinBytesRecorder, BytesRecorder, FullPrecisionSettings, NamedMpkBytesRecorder};
use burn::tensor::Tensor;
use fusedkv::backend::{Flex, FlexDevice};
use fusedkv::config::{LayerKind, NormPlacement, QkNorm, RopeConfig};
use fusedkv::decoder::{DecoderRecord, PlanRecord, RecordError};
use fusedkv::{
    BlendWeights, BlockConfig, FusedKvDecoder, FusedKvDecoderConfig, KvPlan, KvSource, LayerKv,
    Logits, TokenBatch,
};
use proptest::prelude::*;

use crate::models::{VOCAB, changed, fixed, model, plans, values};

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
    read(recorder, write(recorder, record))
}

fn write<R: BytesRecorder<Flex, Vec<u8>>>(recorder: &R, record: DecoderRecord<Flex>) -> Vec<u8> {
    recorder.record(record, ()).unwrap()
}

fn read<R: BytesRecorder<Flex, Vec<u8>>>(recorder: &R, bytes: Vec<u8>) -> DecoderRecord<Flex> {
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
        (
            KvPlan::Standard,
            "model.layers.2.self_attn.k_proj.weight",
            true,
        ),
        (
            KvPlan::FusedKv { storage_layers: 3 },
            "model.layers.2.self_attn.k_proj.weight",
            true,
        ),
        (
            KvPlan::Yoco { storage_layers: 2 },
            "model.layers.2.self_attn.kv_fusion.key_weight",
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

/// Decoders whose records are kept in tests/golden/records, as they were written when an attention had
/// optional modules: keys and values apart, and values that are what a projection of keys gives.
fn kept() -> [(&'static str, FusedKvDecoderConfig); 2] {
    // Keys and values apart.
    let plan = plans(4).swap_remove(2);
    let apart = fixed(plan).with_tie_embeddings(false);
    let blend = |sources, weights| KvSource::Blend { sources, weights };
    let layers = vec![
        LayerKv::OWN,
        LayerKv {
            key: KvSource::AsIs(0),
            value: KvSource::OWN,
        },
        LayerKv {
            key: KvSource::Own { residual: Some(0) },
            value: blend(vec![1, 2], BlendWeights::PerChannel),
        },
        LayerKv {
            key: blend(vec![0, 2], BlendWeights::PerLayer),
            value: KvSource::AsIs(2),
        },
    ];
    let kind = LayerKind {
        rope: Some(RopeConfig::new(1e4)),
        k_eq_v: true,
        ..LayerKind::default()
    };
    let mut block = BlockConfig::default();
    block.layers = vec![kind; 4];
    (block.qkv_bias, block.output_bias, block.mlp_bias) = (true, true, true);
    (block.value_norm, block.layer_scalar) = (true, true);
    block.qk_norm = QkNorm::AllHeads;
    block.norm_placement = NormPlacement::Sandwich;
    block.layer_input_size = Some(4);
    let keys_as_values = fixed(KvPlan::Custom { layers }).with_block(block);
    [("apart", apart), ("keys_as_values", keys_as_values)]
}

/// Binary ones, which have no names, and those of MessagePack; new ones are the same to the byte.
#[test]
fn records_of_before_are_read() {
    for (name, config) in kept() {
        let expected = logits(&model(&config, 1));
        let decoder = model::<Flex>(&config, 2);
        assert_ne!(logits(&decoder), expected);
        let bytes = |extension| {
            let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/records");
            std::fs::read(golden.join(name).with_extension(extension)).unwrap()
        };
        let named = NamedMpkBytesRecorder::<FullPrecisionSettings>::default();
        let binary = BinBytesRecorder::<FullPrecisionSettings>::default();
        let loaded = |record| {
            let loaded = decoder.clone().try_load_record(record).unwrap();
            assert_eq!(logits(&loaded), expected, "{name}");
            loaded.into_record()
        };
        let record = loaded(read(&named, bytes("mpk")));
        assert!(
            write(&named, record) == bytes("mpk"),
            "{name} is written otherwise"
        );
        let record = loaded(read(&binary, bytes("bin")));
        assert!(
            write(&binary, record) == bytes("bin"),
            "{name} is written otherwise"
        );
    }
}

/// Whoever takes a part out of a record, or puts one in, is told which.
#[test]
fn a_record_without_a_part_is_refused_by_name() {
    let [(_, apart), (_, keys_as_values)] = kept();
    let record = |config: &FusedKvDecoderConfig| model::<Flex>(config, 1).into_record();
    type Change = fn(&mut DecoderRecord<Flex>);
    let taken: [(&FusedKvDecoderConfig, &str, Change); 12] = [
        (&apart, "lm_head.weight", |r| r.lm_head = None),
        (&apart, "model.layers.1.self_attn.k_proj.weight", |r| {
            r.layers[1].self_attn.k_proj = None;
        }),
        (&apart, "model.layers.2.self_attn.v_proj.weight", |r| {
            r.layers[2].self_attn.v_proj = None;
        }),
        (&apart, "model.layers.0.self_attn.k_norm.weight", |r| {
            r.layers[0].self_attn.k_norm = None;
        }),
        (
            &apart,
            "model.layers.3.self_attn.kv_fusion.key_weight",
            |r| {
                r.layers[3].self_attn.kv_fusion = None;
            },
        ),
        (
            &apart,
            "model.layers.1.self_attn.kv_fusion.value_weight",
            |r| {
                let fusion = r.layers[1].self_attn.kv_fusion.as_mut();
                fusion.unwrap().value_weight = None;
            },
        ),
        (
            &apart,
            "model.layers.1.self_attn.kv_residual.key_weight",
            |r| {
                r.layers[1].self_attn.kv_residual = None;
            },
        ),
        (
            &keys_as_values,
            "model.layers.1.self_attn.k_proj.weight",
            |r| {
                r.layers[1].self_attn.k_proj = None;
            },
        ),
        (
            &keys_as_values,
            "model.layers.0.self_attn.q_norm.weight",
            |r| {
                r.layers[0].self_attn.q_norm = None;
            },
        ),
        (
            &keys_as_values,
            "model.layers.2.self_attn.k_proj.bias",
            |r| {
                let projection = r.layers[2].self_attn.k_proj.as_mut();
                projection.unwrap().bias = None;
            },
        ),
        (&keys_as_values, "model.layers.3.layer_scalar", |r| {
            r.layers[3].layer_scalar = None;
        }),
        (
            &keys_as_values,
            "model.layers.0.per_layer_projection.weight",
            |r| {
                r.layers[0].per_layer_projection = None;
            },
        ),
    ];
    for (config, parameter, take) in taken {
        let mut record = record(config);
        take(&mut record);
        let error = model::<Flex>(config, 2).try_load_record(record);
        let parameter = parameter.to_owned();
        let in_record = false;
        let expected = RecordError::Parameter {
            parameter,
            in_record,
        };
        assert_eq!(error.unwrap_err(), expected);
    }
    let [mut more, mut other] = [record(&apart), record(&apart)];
    more.layers[3].self_attn.v_proj = other.layers[0].self_attn.v_proj.take();
    let error = model::<Flex>(&apart, 2).try_load_record(more).unwrap_err();
    let expected = RecordError::Parameter {
        parameter: "model.layers.3.self_attn.v_proj.weight".to_owned(),
        in_record: true,
    };
    assert_eq!(error, expected);
}

/// Of the same plan, and another block or other sizes.
#[test]
fn a_record_of_another_block_is_refused_by_name() {
    let own = fixed(KvPlan::Standard);
    let decoder = || model::<Flex>(&own, 2);
    let mut biased = own.clone();
    biased.block.output_bias = true;
    let error = decoder().try_load_record(model(&biased, 1).into_record());
    let expected = RecordError::Parameter {
        parameter: "model.layers.0.self_attn.o_proj.bias".to_owned(),
        in_record: true,
    };
    assert_eq!(error.unwrap_err(), expected);
    let wider = own.clone().with_ffn_size(11);
    let error = decoder().try_load_record(model(&wider, 1).into_record());
    let expected = RecordError::Shape {
        parameter: "model.layers.0.mlp.gate_proj.weight".to_owned(),
        record: vec![12, 11],
        decoder: vec![12, 10],
    };
    assert_eq!(error.unwrap_err(), expected);
}

#[test]
#[should_panic(expected = "the record lacks `model.layers.2.self_attn.v_proj.weight`")]
fn burns_own_loading_refuses_a_record_without_a_part() {
    let decoder = model::<Flex>(&fixed(KvPlan::Standard), 1);
    let mut record = decoder.clone().into_record();
    record.layers[2].self_attn.v_proj = None;
    let _ = decoder.load_record(record);
}

#[test]
#[should_panic(expected = "a mapper changed the shape of `model.layers.1.input_layernorm.weight`")]
fn mapping_leaves_parameters_their_shapes() {
    let model = model::<Flex>(&fixed(KvPlan::Standard), 1);
    // One number would count for every channel.
    let narrow = |gain: Tensor<Flex, 1>| gain.narrow(0, 0, 1);
    let _ = changed(model, "model.layers.1.input_layernorm.weight", narrow);
}
