//! What a configuration costs: parameters, cache bytes, bytes read, FLOPs.

use crate::config::{ConfigError, FusedKvDecoderConfig};
use crate::parameters::{TensorSpec, tensors};
use crate::plan::{KvLayout, KvPart};

/// Costs of a decoder, derived from its configuration and plan alone.
///
/// FLOPs count two per multiply-add of the matrix products (projections, SwiGLU, attention, output
/// head), for one row. A query attends to its own and earlier positions only, and a blend of k
/// sources is attended to without materialising it, as the cached path does: k products per key.
///
/// ```
/// use fusedkv::{FusedKvDecoderConfig, KvPlan};
///
/// let fused = FusedKvDecoderConfig::b1_5(|l| KvPlan::FusedKv { storage_layers: l / 2 });
/// let standard = FusedKvDecoderConfig::b1_5(|_| KvPlan::Standard);
/// let (fused, standard) = (fused.costs()?, standard.costs()?);
/// assert_eq!(2 * fused.cache_bytes_per_token(2), standard.cache_bytes_per_token(2));
/// # Ok::<(), fusedkv::ConfigError>(())
/// ```
#[derive(Clone, Debug)]
pub struct DecoderCosts {
    config: FusedKvDecoderConfig,
    layout: KvLayout,
}

impl FusedKvDecoderConfig {
    /// The costs of this configuration.
    ///
    /// # Errors
    /// [`ConfigError`] as [`validate`](Self::validate).
    pub fn costs(&self) -> Result<DecoderCosts, ConfigError> {
        Ok(DecoderCosts {
            layout: self.validate()?,
            config: self.clone(),
        })
    }
}

impl DecoderCosts {
    /// Number of learned parameters; a tied head counts once.
    pub fn parameters(&self) -> usize {
        let tensors = tensors(&self.config, &self.layout);
        tensors.iter().map(TensorSpec::elements).sum()
    }

    /// Bytes one token of one row takes in the cache, at `element_bytes` per element (4 for f32,
    /// 2 for f16 and bf16).
    pub fn cache_bytes_per_token(&self, element_bytes: usize) -> usize {
        let stored = KvPart::BOTH.map(|part| self.layout.n_stored(part));
        stored.iter().sum::<usize>() * self.kv_width() * element_bytes
    }

    /// Cache bytes that decoding one token of one row reads when `context` tokens are cached
    /// (itself included): every layer reads each stored tensor it attends to once.
    pub fn cache_bytes_read_per_token(&self, context: usize, element_bytes: usize) -> usize {
        let reads: usize = (0..self.config.n_layers)
            .map(|layer| self.layout.n_reads(layer))
            .sum();
        reads * context * self.kv_width() * element_bytes
    }

    /// FLOPs to prefill `prompt` tokens of one row into an empty cache and get the last one's
    /// logits. Above the highest storing layer, and in it past its keys and values, only the last
    /// position is computed.
    pub fn prefill_flops(&self, prompt: usize) -> usize {
        self.flops(prompt, 0)
    }

    /// FLOPs to decode one token of one row that attends to `context` tokens, itself included.
    pub fn decode_flops(&self, context: usize) -> usize {
        self.flops(1, context.saturating_sub(1))
    }

    /// FLOPs of `tokens` new positions after `cached` ones, with the last position's logits.
    fn flops(&self, tokens: usize, cached: usize) -> usize {
        if tokens == 0 {
            return 0;
        }
        let c = &self.config;
        let q_width = c.n_heads * c.head_dim;
        // Pairs of query and key: position t attends to t + 1 keys.
        let all_pairs = tokens * cached + tokens * (tokens + 1) / 2;
        let last_pairs = cached + tokens;
        let head = c.vocab_size * c.hidden_size;
        let layers: usize = (0..c.n_layers)
            .map(|layer| {
                let (queries, pairs) = if layer < self.layout.last_store() {
                    (tokens, all_pairs)
                } else {
                    (1, last_pairs)
                };
                let stored = KvPart::BOTH.map(|part| self.layout.stores(part, layer));
                let stored = stored.into_iter().filter(|&stored| stored).count();
                let kv = tokens * stored * c.hidden_size * self.kv_width();
                kv + queries * self.trunk_weights() + pairs * q_width * self.layout.n_reads(layer)
            })
            .sum();
        2 * (layers + head)
    }

    /// q, o and SwiGLU projections of one layer.
    fn trunk_weights(&self) -> usize {
        let c = &self.config;
        c.hidden_size * (2 * c.n_heads * c.head_dim + 3 * c.ffn_size)
    }

    fn kv_width(&self) -> usize {
        self.config.n_kv_heads * self.config.head_dim
    }
}

#[cfg(test)]
mod tests {
    use burn_flex::{Flex, FlexDevice};
    use proptest::prelude::*;

    use crate::kernels::work::multiply_adds;
    use crate::{
        BlendWeights, FusedKvDecoderConfig, KvPlan, KvSource, LayerKv, Logits, TokenBatch,
    };

    /// All methods, and a plan that stores above a layer that reuses, keys and values apart.
    fn plans() -> Vec<KvPlan> {
        let mut plans: Vec<_> = KvPlan::methods()
            .map(|method| KvPlan::from_method(method, 5).unwrap())
            .collect();
        plans.extend((1..5).map(|storage_layers| KvPlan::Yoco { storage_layers }));
        let blend = |sources| KvSource::Blend {
            sources,
            weights: BlendWeights::PerChannel,
        };
        let layer = |key, value| LayerKv { key, value };
        let layers = vec![
            LayerKv::OWN,
            layer(KvSource::AsIs(0), blend(vec![0])),
            LayerKv::OWN,
            layer(KvSource::OWN, blend(vec![0, 2])),
            layer(blend(vec![0, 3]), blend(vec![2, 4])),
        ];
        plans.push(KvPlan::Custom { layers });
        plans
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// No position is computed that nobody reads, in one pass or in several.
        #[test]
        fn prefill_and_decoding_multiply_as_often_as_they_cost(
            plan in prop::sample::select(plans()),
            prompt in 1usize..40,
            chunk in 1usize..50,
            group in 1usize..3,
        ) {
            let config = FusedKvDecoderConfig::new(13, plan)
                .with_hidden_size(12)
                .with_n_layers(5)
                .with_n_heads(2 * group)
                .with_n_kv_heads(2)
                .with_head_dim(6)
                .with_ffn_size(10);
            let costs = config.costs().unwrap();
            let model = config.init::<Flex>(&FlexDevice).unwrap().with_prefill_chunk(chunk);
            let mut cache = model.new_cache(1, prompt + 1).unwrap();
            let mut read = |tokens: usize| {
                let tokens = vec![1; tokens];
                let batch = TokenBatch::from_rows(&[tokens], 13, &FlexDevice).unwrap();
                multiply_adds(|| {
                    model.forward_cached(batch, &mut cache, Logits::Last).unwrap();
                })
            };
            prop_assert_eq!(2 * read(prompt), costs.prefill_flops(prompt));
            prop_assert_eq!(2 * read(1), costs.decode_flops(prompt + 1));
        }
    }
}
