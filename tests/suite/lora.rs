//! Adapters of low rank: what they add, what they become in the weights, and what is refused.

use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Tensor, TensorData, backend::Backend};
use fusedkv::backend::Flex;
use fusedkv::decoder::RecordError;
use fusedkv::{
    FusedKvDecoder, KvPlan, Logits, LoraConfig, LoraError, TokenBatch, WeightError, WeightFormat,
};
use proptest::prelude::*;

use crate::models::{Case, F64, agree, any_case, difference, exact, model, off, small, values};

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

/// A decoder with such adapters.
pub fn learned<B: Backend>(model: FusedKvDecoder<B>, lora: &LoraConfig) -> FusedKvDecoder<B> {
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
        let merged = adapted.merge_lora().unwrap();
        prop_assert!(merged.lora().is_none());
        prop_assert!(difference(&logits(&merged, &case.tokens), &expected) < 1e-7);
    }

    /// Beside all projections, so that some of them always tell in the logits.
    #[test]
    fn what_adapters_add_is_no_rounding(case in any_case(2..20)) {
        let base = case.model::<F64>();
        let adapted = learned(base.clone(), &config(&base, u16::MAX));
        let [without, with] = [base, adapted].map(|model| logits(&model, &case.tokens));
        prop_assert!(difference(&without, &with) > 1e-6);
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
        let exact = learned(exact(&case, &floats), &lora);
        let exact = values(&logits(&exact, &case.tokens));
        let [packed, floats] = [packed, floats].map(|model| learned(model, &lora));
        let of = |model: &FusedKvDecoder<Flex>| values(&logits(model, &case.tokens));
        let expected = of(&floats);
        prop_assert!(agree(&of(&packed), &expected, &exact));
        let bytes = packed.weight_bytes();
        let packed = packed.merge_lora().unwrap();
        prop_assert_eq!(packed.weight_bytes(), bytes);
        let floats = floats.merge_lora().unwrap();
        // Bytes say that formats are what they were; numbers, that rounding again is all that is lost.
        for layer in 0..case.config.n_layers {
            let name = format!("model.layers.{layer}.self_attn.q_proj.weight");
            let weight = |model: &FusedKvDecoder<Flex>| model.parameter::<2>(&name).unwrap();
            let expected = weight(&floats);
            let largest = expected.clone().abs().max().into_scalar();
            let step = match format {
                WeightFormat::Model => 1e-6,
                WeightFormat::Int8 => 0.008,
                WeightFormat::Int4 => 0.15,
                WeightFormat::F16 => 1e-3,
                _ => 8e-3,
            };
            let error = weight(&packed).cast(DType::F32) - expected;
            let error = error.abs().max().into_scalar();
            prop_assert!(error <= step * largest, "{} {} {}", format, error, largest);
        }
    }

    #[test]
    fn adapters_are_read_through_the_cache(
        case in any_case(2..24),
        bits in any::<u16>(),
        chunk in 1usize..9,
    ) {
        let base = case.model::<F64>();
        let adapted = learned(base.clone(), &config(&base, bits));
        let expected = values(&logits(&adapted, &case.tokens));
        let Case { tokens, config, .. } = &case;
        let seq = tokens[0].len();
        let mut cache = adapted.new_cache(tokens.len(), seq).unwrap();
        let mut found = vec![Vec::new(); tokens.len()];
        for start in (0..seq).step_by(chunk) {
            let part: Vec<_> = tokens.iter().map(|row| &row[start..(start + chunk).min(seq)]).collect();
            let batch = TokenBatch::from_rows(&part, config.vocab_size, &adapted.device()).unwrap();
            let logits = adapted.forward_cached(batch, &mut cache, Logits::All).unwrap();
            let logits = values(&logits);
            let of_row = logits.len() / tokens.len();
            for (row, logits) in found.iter_mut().zip(logits.chunks(of_row)) {
                row.extend_from_slice(logits);
            }
        }
        prop_assert!(off(&found.concat(), &expected) < 1e-6);
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
    let has = |layer: usize, projection: &str| {
        let name = format!("model.layers.{layer}.{projection}.lora.a");
        adapted.parameter::<2>(&name).is_some()
    };
    for layer in 0..adapted.config().n_layers {
        assert_eq!(has(layer, "self_attn.v_proj"), layer < 2);
        assert!(!has(layer, "self_attn.q_proj") && has(layer, "mlp.up_proj"));
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

/// A record has the decoder without adapters, and is refused beside them; of a decoder that has some there
/// is none.
#[test]
fn records_have_no_adapters() {
    let base = model::<Flex>(&small(KvPlan::FusedKv { storage_layers: 2 }), 1);
    let adapted = learned(base.clone(), &LoraConfig::new(2, 3.0));
    let lacks = RecordError::Parameter {
        parameter: "model.layers.0.self_attn.q_proj.lora.a".to_owned(),
        in_record: false,
    };
    let found = adapted.clone().try_load_record(base.into_record());
    assert_eq!(found.unwrap_err(), lacks);
    let record = catch_unwind(AssertUnwindSafe(|| adapted.into_record()));
    let Err(panic) = record else {
        panic!("a record without a decoder's adapters");
    };
    let message = panic.downcast_ref::<&str>().unwrap();
    assert!(message.contains("merge_lora"), "{message}");
}
