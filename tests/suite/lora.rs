//! Adapters of low rank: what they add, what they become in the weights, and what is refused.

use burn::module::{Module, ModuleMapper, Param};
use burn::record::{BinBytesRecorder, FullPrecisionSettings, Recorder};
use burn::tensor::{Tensor, TensorData, backend::Backend};
use fusedkv::backend::{Flex, FlexDevice};
use fusedkv::decoder::RecordError;
use fusedkv::{
    FusedKvDecoder, KvPlan, Logits, LoraConfig, LoraError, TokenBatch, WeightError, WeightFormat,
};
use proptest::prelude::*;

use crate::models::{Case, F64, any_case, difference, model, off, small, values};

fn logits<B: Backend>(model: &FusedKvDecoder<B>, rows: &[Vec<u32>]) -> Tensor<B, 3> {
    let batch = TokenBatch::from_rows(rows, model.config().vocab_size, &model.device());
    model.forward(batch.unwrap()).unwrap()
}

/// The projections that layers of a decoder have.
fn known<B: Backend>(model: &FusedKvDecoder<B>) -> Vec<String> {
    let none = LoraConfig::new(1, 1.0).with_targets(Vec::new());
    match model.clone().with_lora(&none).unwrap_err() {
        LoraError::NoTargets(known) => known,
        error => panic!("{error}"),
    }
}

/// Adapters of rank 3 beside the projections whose bits are set.
fn config<B: Backend>(model: &FusedKvDecoder<B>, bits: u16) -> LoraConfig {
    let known = known(model);
    let chosen = |(i, _): &(usize, String)| bits >> i & 1 == 1;
    let targets: Vec<String> = (known.iter().cloned().enumerate())
        .filter(chosen)
        .map(|(_, name)| name)
        .collect();
    let targets = match targets.is_empty() {
        true => known,
        false => targets,
    };
    LoraConfig::new(3, 4.5).with_targets(targets)
}

/// Gives both matrices of every adapter numbers of their own; the same ones for every backend.
struct Learned(Vec<String>);

impl<B: Backend> ModuleMapper<B> for Learned {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.0.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.0.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        if !self.0.contains(&"lora".to_owned()) {
            return param;
        }
        let path: u32 = self.0.join(".").bytes().map(u32::from).sum();
        param.map(|tensor| {
            let shape = tensor.shape();
            let number = |i: usize| ((i as f64 + 1.3) * f64::from(path)).sin() * 0.7;
            let numbers: Vec<f64> = (0..shape.num_elements()).map(number).collect();
            let data = TensorData::new(numbers, shape);
            Tensor::from_data(data, (&tensor.device(), tensor.dtype()))
        })
    }
}

fn learned<B: Backend>(model: FusedKvDecoder<B>, lora: &LoraConfig) -> FusedKvDecoder<B> {
    model.with_lora(lora).unwrap().map(&mut Learned(Vec::new()))
}

fn format() -> impl Strategy<Value = WeightFormat> {
    let formats = WeightFormat::NAMES.iter().map(|(_, format)| *format);
    prop::sample::select(formats.collect::<Vec<_>>())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn new_adapters_change_nothing(
        case in any_case(1..20),
        bits in any::<u16>(),
        format in format(),
    ) {
        let base = case.model::<Flex>().with_weights(format).unwrap();
        let adapted = base.clone().with_lora(&config(&base, bits)).unwrap();
        let [found, expected] = [&adapted, &base].map(|model| values(&logits(model, &case.tokens)));
        prop_assert_eq!(found, expected);
        prop_assert_eq!(adapted.weight_bytes(), base.weight_bytes());
    }

    #[test]
    fn merged_adapters_compute_what_they_did(case in any_case(1..20), bits in any::<u16>()) {
        let base = case.model::<F64>();
        let adapted = learned(base.clone(), &config(&base, bits));
        let expected = logits(&adapted, &case.tokens);
        // What they add is no rounding.
        prop_assert!(difference(&logits(&base, &case.tokens), &expected) > 1e-6);
        let merged = adapted.merge_lora().unwrap();
        prop_assert!(merged.lora().is_none());
        prop_assert!(difference(&logits(&merged, &case.tokens), &expected) < 1e-7);
    }

    /// Beside a matrix of any numbers they add what they add beside the same numbers as floats; merged,
    /// the sum is in the matrix's format again.
    #[test]
    fn adapters_stand_beside_matrices_in_any_format(
        case in any_case(1..40),
        bits in any::<u16>(),
        format in format(),
    ) {
        let packed = case.model::<Flex>().with_weights(format).unwrap();
        let floats = packed.clone().with_weights(WeightFormat::Model).unwrap();
        let lora = config(&packed, bits);
        let [packed, floats] = [packed, floats].map(|model| learned(model, &lora));
        let of = |model: &FusedKvDecoder<Flex>| values(&logits(model, &case.tokens));
        let expected = of(&floats);
        prop_assert!(off(&of(&packed), &expected) < 1e-3);
        let bytes = packed.weight_bytes();
        let packed = packed.merge_lora().unwrap();
        prop_assert_eq!(packed.weight_bytes(), bytes);
        let floats = floats.merge_lora().unwrap();
        prop_assert!(off(&of(&floats), &expected) < 1e-3);
        // Those without an adapter, packed again, come out as they were.
        let layers = packed.layers.iter().zip(&floats.layers);
        for (packed, floats) in layers {
            let [packed, floats] = [packed, floats].map(|layer| &layer.self_attn.q_proj.weight);
            prop_assert_eq!(packed.format(), if format == WeightFormat::Model { floats.format() } else { format });
            let largest = floats.val().abs().max().into_scalar();
            let step = match format {
                WeightFormat::Model => 1e-6,
                WeightFormat::Int8 => 0.008,
                WeightFormat::Int4 => 0.15,
                WeightFormat::F16 => 1e-3,
                _ => 8e-3,
            };
            let error = (packed.val().cast(burn::tensor::DType::F32) - floats.val()).abs().max().into_scalar();
            prop_assert!(error <= step * largest, "{} {} {}", format, error, largest);
        }
    }

    #[test]
    fn adapters_are_read_through_the_cache(
        case in any_case(2..24),
        bits in any::<u16>(),
        chunk in 1usize..9,
    ) {
        let base = case.model::<Flex>();
        let adapted = learned(base.clone(), &config(&base, bits));
        let expected = values(&logits(&adapted, &case.tokens));
        let Case { tokens, config, .. } = &case;
        let seq = tokens[0].len();
        let mut cache = adapted.new_cache(tokens.len(), seq).unwrap();
        let mut found = vec![Vec::new(); tokens.len()];
        for start in (0..seq).step_by(chunk) {
            let part: Vec<_> = tokens.iter().map(|row| &row[start..(start + chunk).min(seq)]).collect();
            let batch = TokenBatch::from_rows(&part, config.vocab_size, &FlexDevice).unwrap();
            let logits = adapted.forward_cached(batch, &mut cache, Logits::All).unwrap();
            let logits = values(&logits);
            let of_row = logits.len() / tokens.len();
            for (row, logits) in found.iter_mut().zip(logits.chunks(of_row)) {
                row.extend_from_slice(logits);
            }
        }
        prop_assert!(off(&found.concat(), &expected) < 1e-4);
    }
}

#[test]
fn adapters_that_cannot_be_are_refused() {
    let base = model::<Flex>(&small(KvPlan::Yoco { storage_layers: 2 }), 1);
    let refused = |lora: LoraConfig| base.clone().with_lora(&lora).unwrap_err();
    assert_eq!(refused(LoraConfig::new(0, 1.0)), LoraError::Rank);
    for alpha in [0.0, -1.0, f64::INFINITY] {
        assert_eq!(refused(LoraConfig::new(2, alpha)), LoraError::Alpha(alpha));
    }
    assert!(matches!(
        refused(LoraConfig::new(2, f64::NAN)),
        LoraError::Alpha(_)
    ));
    let named = |names: &[&str]| {
        let names = names.iter().map(|&name| name.to_owned()).collect();
        LoraConfig::new(2, 1.0).with_targets(names)
    };
    let expected: Vec<String> = [
        "mlp.down_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "self_attn.k_proj",
        "self_attn.o_proj",
        "self_attn.q_proj",
        "self_attn.v_proj",
    ]
    .map(str::to_owned)
    .into();
    assert_eq!(refused(named(&[])), LoraError::NoTargets(expected.clone()));
    for target in ["lm_head", "proj", "attn.q_proj", "", "q_proj."] {
        assert_eq!(
            refused(named(&["q_proj", target])),
            LoraError::UnknownTarget {
                target: target.to_owned(),
                known: expected.clone(),
            }
        );
    }
    let adapted = base.clone().with_lora(&named(&["v_proj", "mlp.up_proj"]));
    let adapted = adapted.unwrap();
    let again = adapted.clone().with_lora(&named(&["q_proj"]));
    assert_eq!(again.unwrap_err(), LoraError::Adapted);
    // Where the layer has the projection, and nowhere else.
    for (i, layer) in adapted.layers.iter().enumerate() {
        let attention = &layer.self_attn;
        let value = attention.v_proj.as_ref().map(|v| v.lora.is_some());
        assert_eq!(value, (i < 2).then_some(true));
        assert!(attention.q_proj.lora.is_none() && layer.mlp.up_proj.lora.is_some());
    }
}

#[test]
fn a_sum_that_the_format_cannot_hold_is_named() {
    let base = model::<Flex>(&small(KvPlan::Standard), 1)
        .with_weights(WeightFormat::F16)
        .unwrap();
    let lora = LoraConfig::new(1, 1e6).with_targets(vec!["down_proj".to_owned()]);
    let error = learned(base, &lora).merge_lora().unwrap_err();
    assert!(
        matches!(&error, WeightError::Overflow { tensor, format: WeightFormat::F16, .. }
            if tensor == "model.layers.0.mlp.down_proj.weight"),
        "{error}"
    );
}

#[test]
fn records_have_their_adapters() {
    let base = model::<Flex>(&small(KvPlan::FusedKv { storage_layers: 2 }), 1);
    let lora = LoraConfig::new(2, 3.0);
    let adapted = learned(base.clone(), &lora);
    let recorder = BinBytesRecorder::<FullPrecisionSettings>::default();
    let bytes = Recorder::<Flex>::record(&recorder, adapted.clone().into_record(), ()).unwrap();
    let load = |to: FusedKvDecoder<Flex>| {
        let record = Recorder::<Flex>::load(&recorder, bytes.clone(), &FlexDevice).unwrap();
        to.try_load_record(record)
    };
    let rows = [vec![1, 2, 3]];
    let found = load(base.clone().with_lora(&lora).unwrap()).unwrap();
    assert_eq!(
        values(&logits(&found, &rows)),
        values(&logits(&adapted, &rows))
    );
    let lacks = RecordError::Parameter {
        parameter: "layers.0.self_attn.q_proj.lora".to_owned(),
        in_record: true,
    };
    assert_eq!(load(base).unwrap_err(), lacks);
}
