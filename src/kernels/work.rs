//! What a thread's operations were asked for and by whom they were done, to be compared with what
//! they should be: a position computed for nothing, or by a slower operation, changes no result.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;

use burn::tensor::{Tensor, backend::Backend};

use crate::kernels::operands::{Term, Visibility};

thread_local! {
    static DONE_BY: RefCell<BTreeSet<&'static str>> = const { RefCell::new(BTreeSet::new()) };
    static MULTIPLY_ADDS: Cell<usize> = const { Cell::new(0) };
}

/// How many `work` asks for.
pub fn multiply_adds(work: impl FnOnce()) -> usize {
    MULTIPLY_ADDS.set(0);
    work();
    MULTIPLY_ADDS.get()
}

/// The kernels of ours that `work` is done by, and the operations that none was found for: their
/// names end with `, Burn's`.
#[cfg(feature = "flex")]
pub fn done_by(work: impl FnOnce()) -> BTreeSet<&'static str> {
    DONE_BY.take();
    work();
    DONE_BY.take()
}

/// Says who does an operation.
pub fn is_done_by(kernel: &'static str) {
    DONE_BY.with_borrow_mut(|kernels| kernels.insert(kernel));
}

fn add(multiply_adds: usize) {
    MULTIPLY_ADDS.set(MULTIPLY_ADDS.get() + multiply_adds);
}

pub fn linear([batch, seq, input]: [usize; 3], [_, output]: [usize; 2]) {
    add(batch * seq * input * output);
}

/// A product per visible pair of query and key, and per source of the keys and of the values.
pub fn attention<B: Backend>(
    query: &Tensor<B, 4>,
    keys: &[Term<B>],
    values: &[Term<B>],
    visibility: &Visibility<B>,
) {
    let [batch, n_heads, n_queries, head_dim] = query.dims();
    let [_, _, n_keys, _] = keys[0].source.dims();
    let seen = (0..n_queries).map(|query| visibility.seen.keys(0, query, [n_queries, n_keys]));
    let pairs: usize = seen.map(|keys| keys.len()).sum();
    add(batch * n_heads * pairs * head_dim * (keys.len() + values.len()));
}
