//! Attention: blends are formed once per layer, then it is that of plain keys and values.

use burn::tensor::{DType, Tensor, backend::Backend};
use burn_flex::FlexTensor;

use super::super::attention::{Kept, Trained};
use super::blend::blend;
use super::{Operation, Tracked, record, shaped_as, tracked, untyped};
use crate::kernels::operands::{Term, Visibility};
use crate::kernels::stored::Stored;

pub(crate) fn attention<B: Backend>(
    query: &Tensor<B, 4>,
    keys: &[Term<B>],
    values: &[Term<B>],
    visibility: &Visibility<B>,
) -> Option<Tensor<B, 4>> {
    if query.dtype() != DType::F32 {
        return None;
    }
    let query = tracked(query)?;
    let operation = Attention(Trained::new(visibility));
    let output = record(operation, [query, blended(keys)?, blended(values)?])?;
    untyped(output)
}

/// The sum of weighted terms, or the one term that there is.
fn blended<B: Backend>(terms: &[Term<B>]) -> Option<Tracked> {
    let float = |term: &Term<B>| match &term.source {
        Stored::Float(source) => tracked(&source.clone().cast(DType::F32)),
        Stored::Int8 { .. } => None,
    };
    if let [term @ Term { weight: None, .. }] = terms {
        return float(term);
    }
    let pairs = terms.iter().map(|term| {
        let weight = tracked(term.weight.as_ref()?)?;
        Some((float(term)?, weight))
    });
    blend(pairs.collect::<Option<_>>()?)
}

/// Of queries, keys and values.
#[derive(Debug)]
struct Attention(Trained);

impl Operation<3> for Attention {
    type State = Kept;

    fn forward(&self, [query, key, value]: [FlexTensor; 3]) -> Option<(FlexTensor, Kept)> {
        let kept = self.0.forward(query, key, value);
        Some((kept.output(), kept))
    }

    fn backward(&self, kept: Kept, gradient: FlexTensor, _: [bool; 3]) -> [Option<FlexTensor>; 3] {
        let [query, key, value] = self.0.backward(&kept, &gradient);
        [
            Some(shaped_as(query, kept.query())),
            Some(shaped_as(key, kept.key())),
            Some(shaped_as(value, kept.key())),
        ]
    }
}
