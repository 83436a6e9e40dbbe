//! All matrices of a decoder, to be looked at or kept in another format.

use burn::tensor::backend::Backend;

use super::{FusedKvDecoder, Projection, Weight, WeightError, WeightFormat};
use crate::parameters::{EMBEDDING, HEAD, LAYER_EMBEDDING, LAYER_INPUT};

impl<B: Backend> FusedKvDecoder<B> {
    /// Its matrices in another format, one after another; [`WeightFormat::Model`] is back to floats.
    ///
    /// ```
    /// use fusedkv::backend::{Flex, FlexDevice};
    /// use fusedkv::{FusedKvDecoderConfig, KvPlan, WeightFormat};
    ///
    /// let config = FusedKvDecoderConfig::tiny(256, KvPlan::FusedKv { storage_layers: 3 });
    /// let model = config.init::<Flex>(&FlexDevice::default())?;
    /// let bytes = model.weight_bytes();
    /// let model = model.with_weights(WeightFormat::Int8)?;
    /// assert!(model.weight_bytes() * 3 < bytes);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`WeightError::Unsupported`], [`WeightError::Overflow`].
    pub fn with_weights(mut self, format: WeightFormat) -> Result<Self, WeightError> {
        let dtype = self.dtype();
        format.check::<B>(&self.device())?;
        self.try_for_each_weight(|name, weight, outputs| {
            let changed = weight.clone().into_format(format, dtype, outputs);
            *weight = changed.map_err(|value| WeightError::Overflow {
                tensor: name.to_owned(),
                value,
                format,
            })?;
            Ok(())
        })?;
        Ok(self)
    }

    /// Its packed matrices as parameters of f32, the others as they are.
    #[cfg(feature = "train")]
    pub(crate) fn with_float_weights(mut self) -> Self {
        let unpack = |_: &str, weight: &mut Weight<B>, _: usize| {
            if let Weight::Packed(_) = weight {
                *weight = weight.clone().map(|numbers| numbers);
            }
            Ok::<_, std::convert::Infallible>(())
        };
        let Ok(()) = self.try_for_each_weight(unpack);
        self
    }

    /// Bytes of its matrices, as allocated.
    pub fn weight_bytes(&self) -> usize {
        self.weights()
            .iter()
            .map(|(_, weight)| weight.bytes())
            .sum()
    }

    /// Those of them that a pass over any number of tokens reads whole: all but embeddings, of which it
    /// looks up the tokens' rows, where they are not the head as well.
    pub fn weight_bytes_read(&self) -> usize {
        let looked_up = |name: &str| match name {
            EMBEDDING => self.lm_head.is_some(),
            name => name == LAYER_EMBEDDING,
        };
        let read = self.weights().into_iter();
        read.filter(|(name, _)| !looked_up(name))
            .map(|(_, weight)| weight.bytes())
            .sum()
    }

    /// Every matrix, by its name in files.
    pub(crate) fn weights(&self) -> Vec<(String, &Weight<B>)> {
        let mut all = vec![(EMBEDDING.to_owned(), &self.embed_tokens.weight)];
        if let Some(embedding) = &self.embed_tokens_per_layer {
            all.push((LAYER_EMBEDDING.to_owned(), &embedding.weight));
        }
        if let Some(projection) = &self.per_layer_model_projection {
            all.push((LAYER_INPUT.to_owned(), &projection.weight));
        }
        let of_layers = self.projections().into_iter();
        all.extend(of_layers.map(|(layer, name, projection)| {
            let name = format!("model.layers.{layer}.{name}.weight");
            (name, &projection.weight)
        }));
        all.extend((self.lm_head.iter()).map(|head| (HEAD.to_owned(), &head.weight)));
        all
    }

    /// A function of every one of [`weights`](Self::weights), and the dimension of its outputs.
    pub(crate) fn try_for_each_weight<E>(
        &mut self,
        mut f: impl FnMut(&str, &mut Weight<B>, usize) -> Result<(), E>,
    ) -> Result<(), E> {
        // An embedding is a projection's transpose.
        f(EMBEDDING, &mut self.embed_tokens.weight, 0)?;
        if let Some(embedding) = &mut self.embed_tokens_per_layer {
            f(LAYER_EMBEDDING, &mut embedding.weight, 0)?;
        }
        if let Some(projection) = &mut self.per_layer_model_projection {
            f(LAYER_INPUT, &mut projection.weight, 1)?;
        }
        self.try_for_each_projection(|layer, name, projection| {
            let name = format!("model.layers.{layer}.{name}.weight");
            f(&name, &mut projection.weight, 1)
        })?;
        match &mut self.lm_head {
            Some(head) => f(HEAD, &mut head.weight, 1),
            None => Ok(()),
        }
    }

    /// The projections of its layers: the layer, the name in it, as `self_attn.q_proj`, and the
    /// projection.
    pub(super) fn projections(&self) -> Vec<(usize, String, &Projection<B>)> {
        let mut all = Vec::new();
        for (i, layer) in self.layers.iter().enumerate() {
            for (of, projections) in [
                ("self_attn.", layer.self_attn.projections()),
                ("mlp.", layer.mlp.projections()),
                ("", layer.projections()),
            ] {
                let of_module = projections.into_iter();
                all.extend(of_module.map(|(name, it)| (i, format!("{of}{name}"), it)));
            }
        }
        all
    }

    /// A function of every one of [`projections`](Self::projections).
    pub(super) fn try_for_each_projection<E>(
        &mut self,
        mut f: impl FnMut(usize, &str, &mut Projection<B>) -> Result<(), E>,
    ) -> Result<(), E> {
        for (i, layer) in self.layers.iter_mut().enumerate() {
            let mut of_module = |of: &str, projections: Vec<(&str, &mut Projection<B>)>| {
                let mut projections = projections.into_iter();
                projections.try_for_each(|(name, it)| f(i, &format!("{of}{name}"), it))
            };
            of_module("self_attn.", layer.self_attn.projections_mut())?;
            of_module("mlp.", layer.mlp.projections_mut())?;
            of_module("", layer.projections_mut())?;
        }
        Ok(())
    }
}
