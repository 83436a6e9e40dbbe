//! Matrices in fewer bits: what they compute, and what they take.

use burn::module::{Module, ModuleMapper, Param};
use burn::record::{BinBytesRecorder, FullPrecisionSettings, Recorder};
use burn::tensor::{Tensor, backend::Backend};
use burn_ndarray::NdArray;
use fusedkv::backend::{Flex, FlexDevice};
use fusedkv::{
    FusedKvDecoder, FusedKvDecoderConfig, KvPlan, Logits, TokenBatch, WeightError, WeightFormat,
};
use proptest::prelude::*;

use crate::models::{Case, agree, any_case, changed, exact, values};

const FORMATS: [WeightFormat; 4] = [
    WeightFormat::F16,
    WeightFormat::Bf16,
    WeightFormat::Int8,
    WeightFormat::Int4,
];

fn format() -> impl Strategy<Value = WeightFormat> {
    prop::sample::select(FORMATS.to_vec())
}

/// All positions' logits: at once, and through a cache in chunks of `chunk`.
fn logits<B: Backend>(
    model: &FusedKvDecoder<B>,
    rows: &[Vec<u32>],
    chunk: usize,
) -> (Vec<f64>, Vec<Vec<f64>>) {
    let batch = |rows: &[Vec<u32>]| {
        TokenBatch::from_rows(rows, model.config().vocab_size, &model.device()).unwrap()
    };
    let whole = values(&model.forward(batch(rows)).unwrap());
    let mut cache = model.new_cache(rows.len(), rows[0].len()).unwrap();
    let chunks = (0..rows[0].len()).step_by(chunk).map(|start| {
        let part = |row: &Vec<u32>| row[start..(start + chunk).min(row.len())].to_vec();
        let part: Vec<_> = rows.iter().map(part).collect();
        let logits = model.forward_cached(batch(&part), &mut cache, Logits::All);
        values(&logits.unwrap())
    });
    (whole, chunks.collect())
}

/// A model with matrices in a format, and the one whose floats are the same numbers.
fn both(case: &Case, format: WeightFormat) -> [FusedKvDecoder<Flex>; 2] {
    let packed = case.model::<Flex>().with_weights(format).unwrap();
    let widened = packed.clone().with_weights(WeightFormat::Model).unwrap();
    [packed, widened]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Any block and plan; whole, and in chunks.
    #[test]
    fn packed_weights_compute_what_their_numbers_do(
        case in any_case(1..40),
        format in format(),
        chunk in 1usize..20,
    ) {
        let models = both(&case, format);
        let exact = logits(&exact(&case, &models[1]), &case.tokens, chunk);
        let [packed, widened] = models.map(|model| logits(&model, &case.tokens, chunk));
        prop_assert!(agree(&packed.0, &widened.0, &exact.0));
        let chunks = packed.1.iter().zip(&widened.1).zip(&exact.1);
        for ((packed, widened), exact) in chunks {
            prop_assert!(agree(packed, widened, exact));
        }
    }

    /// Records, visitors and mappers see the numbers; floats that are packed twice are the same.
    #[test]
    fn a_packed_matrix_is_a_parameter_to_who_looks(case in any_case(1..2), format in format()) {
        let [packed, widened] = both(&case, format);
        prop_assert_eq!(packed.num_params(), widened.num_params());
        let recorder = BinBytesRecorder::<FullPrecisionSettings>::default();
        let record = |model: &FusedKvDecoder<Flex>| {
            Recorder::<Flex>::record(&recorder, model.clone().into_record(), ()).unwrap()
        };
        let bytes = record(&packed);
        let loaded = Recorder::<Flex>::load(&recorder, bytes, &FlexDevice).unwrap();
        let loaded = case.model::<Flex>().try_load_record(loaded).unwrap();
        let of = |model: &FusedKvDecoder<Flex>| logits(model, &case.tokens, 1).0;
        prop_assert_eq!(of(&loaded), of(&widened));
        let again = widened.with_weights(format).unwrap();
        prop_assert_eq!(again.weight_bytes(), packed.weight_bytes());
        // Groups may be given other scales.
        if matches!(format, WeightFormat::F16 | WeightFormat::Bf16) {
            prop_assert_eq!(of(&again), of(&packed));
        }
    }
}

#[test]
fn bytes_are_those_of_the_format() {
    let config = FusedKvDecoderConfig::tiny(256, KvPlan::FusedKv { storage_layers: 3 });
    let model = config.init::<Flex>(&FlexDevice).unwrap();
    let bytes = |format| model.clone().with_weights(format).unwrap().weight_bytes();
    let all = bytes(WeightFormat::Model);
    assert_eq!(all, model.weight_bytes());
    assert_eq!(bytes(WeightFormat::F16) * 2, all);
    assert_eq!(bytes(WeightFormat::Bf16) * 2, all);
    // 34 and 20 bytes for 32 numbers of 4; every width is a multiple of 32.
    assert_eq!(bytes(WeightFormat::Int8) * 64, all * 17);
    assert_eq!(bytes(WeightFormat::Int4) * 32, all * 5);
}

#[test]
fn names_are_read_as_written() {
    for (name, format) in WeightFormat::NAMES {
        assert_eq!(name.parse(), Ok(*format));
        assert_eq!(format.to_string(), *name);
    }
    let error = "int5".parse::<WeightFormat>().unwrap_err();
    assert_eq!(error, WeightError::Unknown("int5".to_owned()));
    assert!(error.to_string().contains("int8"), "{error}");
}

#[test]
fn what_a_format_cannot_hold_is_refused() {
    let config = FusedKvDecoderConfig::tiny(64, KvPlan::Standard);
    for (format, value) in [
        (WeightFormat::F16, 1e5),
        (WeightFormat::Bf16, f32::MAX),
        (WeightFormat::Int8, 1e7),
        (WeightFormat::Int4, 1e5),
    ] {
        let model = config.init::<Flex>(&FlexDevice).unwrap();
        let tensor = "model.layers.1.mlp.up_proj.weight".to_owned();
        let large = |weight: Tensor<Flex, 2>| weight.zeros_like() + value;
        let error = changed(model, &tensor, large)
            .with_weights(format)
            .unwrap_err();
        let expected = WeightError::Overflow {
            tensor,
            value,
            format,
        };
        assert_eq!(error, expected);
    }
    let model = config.init::<NdArray>(&Default::default()).unwrap();
    let error = model.with_weights(WeightFormat::F16).unwrap_err();
    assert!(
        matches!(&error, WeightError::Unsupported { format: WeightFormat::F16, backend } if backend.contains("ndarray")),
        "{error}"
    );
}

/// Every matrix is packed: of what is left as floats, vectors and the weights of blends.
#[test]
fn no_matrix_is_left_out() {
    /// Counts matrices, and makes every one of them a number larger.
    struct Matrices(usize);
    impl ModuleMapper<Flex> for Matrices {
        fn map_float<const D: usize>(
            &mut self,
            param: Param<Tensor<Flex, D>>,
        ) -> Param<Tensor<Flex, D>> {
            self.0 += usize::from(D == 2) * param.shape().num_elements();
            param
        }
    }
    let mut blocks = vec![fusedkv::BlockConfig::default(); 2];
    blocks[1].layer_input_size = Some(32);
    for block in blocks {
        let plan = KvPlan::FusedKv { storage_layers: 3 };
        let config = FusedKvDecoderConfig::tiny(256, plan)
            .with_tie_embeddings(false)
            .with_block(block);
        let model = config.init::<Flex>(&FlexDevice).unwrap();
        let mut matrices = Matrices(0);
        let model = model.map(&mut matrices);
        let packed = model.with_weights(WeightFormat::Int8).unwrap();
        assert_eq!(packed.weight_bytes() * 32, matrices.0 * 34);
    }
}

/// An embedding that is not the head is looked up.
#[test]
fn a_pass_reads_all_matrices_but_embeddings() {
    let config = FusedKvDecoderConfig::tiny(64, KvPlan::Standard);
    let model = |config: FusedKvDecoderConfig| config.init::<Flex>(&FlexDevice).unwrap();
    let tied = model(config.clone().with_tie_embeddings(true));
    assert_eq!(tied.weight_bytes_read(), tied.weight_bytes());
    let mut of_layers = config.with_tie_embeddings(false);
    of_layers.block.layer_input_size = Some(8);
    let (layers, width) = (of_layers.n_layers, of_layers.hidden_size);
    let untied = model(of_layers);
    let looked_up = 4 * 64 * (width + 8 * layers);
    assert_eq!(
        untied.weight_bytes_read(),
        untied.weight_bytes() - looked_up
    );
}
