//! That the kernels a decoder is computed by are those that are meant: a fallback computes the same, and
//! slowly.

use std::collections::BTreeSet;

use burn_flex::{Flex, FlexDevice};

use super::{FusedKvDecoder, Logits, WeightFormat};
use crate::cache::CacheDtype;
use crate::config::FusedKvDecoderConfig;
use crate::kernels::work::done_by;
use crate::plan::KvPlan;
use crate::tokens::TokenBatch;

/// Wide enough that products of few rows are worth threads.
fn decoder(plan: KvPlan) -> FusedKvDecoder<Flex> {
    let config = FusedKvDecoderConfig::new(300, plan)
        .with_hidden_size(512)
        .with_n_layers(4)
        .with_n_heads(3)
        .with_n_kv_heads(1)
        .with_head_dim(64)
        .with_ffn_size(256);
    config.init(&FlexDevice).unwrap()
}

/// What reads `lens` tokens, one row each, at once and then a token of every row.
fn kernels(
    model: &FusedKvDecoder<Flex>,
    cache: CacheDtype,
    lens: &[usize],
) -> [BTreeSet<&'static str>; 2] {
    let mut cache = model.new_cache_of(cache, lens.len(), 96).unwrap();
    let rows: Vec<_> = lens.iter().map(|&len| vec![1; len]).collect();
    let mut read = |rows: &[Vec<u32>]| {
        let tokens = TokenBatch::from_rows(rows, 300, &FlexDevice).unwrap();
        done_by(|| {
            (model.forward_cached(tokens, &mut cache, Logits::Last)).unwrap();
        })
    };
    [read(&rows), read(&vec![vec![2]; lens.len()])]
}

/// What multiplies many rows by a matrix of f32, for as many multiply-adds as these take.
fn many_rows() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    if matches!(pulp::Arch::new(), pulp::Arch::V3(_)) {
        return "many_rows";
    }
    "linear, Burn's"
}

/// Every plan and cache, and one of them in every format, rows alone and rows of different lengths:
/// nothing is left to Burn's operations but what [`many_rows`] says.
#[test]
fn nothing_that_has_a_kernel_is_left_to_burn() {
    for method in KvPlan::methods() {
        let model = decoder(KvPlan::from_method(method, 4).unwrap());
        let formats = [
            (WeightFormat::Model, [many_rows(), "by_input"]),
            (WeightFormat::F16, ["by_tile", "by_output"]),
            (WeightFormat::Bf16, ["by_tile", "by_output"]),
            (WeightFormat::Int8, ["by_tile", "by_groups"]),
            (WeightFormat::Int4, ["by_tile", "by_groups"]),
        ];
        let formats = match method {
            "fused_kv" => &formats[..],
            _ => &formats[..1],
        };
        for &(format, [many, few]) in formats {
            let model = model.clone().with_weights(format).unwrap();
            for cache in [
                CacheDtype::F32,
                CacheDtype::F16,
                CacheDtype::Bf16,
                CacheDtype::Int8,
            ] {
                for lens in [&[80][..], &[80, 73]] {
                    let [prefill, decode] = kernels(&model, cache, lens);
                    let what = format!("{method}, {format} weights, {cache} cache, {lens:?}");
                    // Several matrices of many rows are taken one by one.
                    let left = (prefill.iter())
                        .filter(|kernel| kernel.ends_with("Burn's"))
                        .filter(|kernel| **kernel != "linear_each, Burn's");
                    for kernel in left {
                        assert_eq!(*kernel, many, "prefill of {what}");
                    }
                    assert!(prefill.contains(many), "prefill of {what}: {prefill:?}");
                    assert!(prefill.contains("many"), "prefill of {what}: {prefill:?}");
                    let left: Vec<_> = (decode.iter())
                        .filter(|kernel| kernel.ends_with("Burn's"))
                        .collect();
                    assert!(left.is_empty(), "decoding {what}: {left:?}");
                    assert!(
                        decode.contains(few) && decode.contains("few"),
                        "decoding {what}: {decode:?}"
                    );
                }
            }
        }
    }
}
