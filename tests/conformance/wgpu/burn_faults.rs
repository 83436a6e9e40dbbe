//! The faults of Burn 0.21's fusion on CubeCL that the decoder goes around, in Burn's operations
//! alone: docs/decisions/cubecl-faults.md. Whether most are seen depends on the kernel that tuning finds
//! fastest, so those tests are ignored unless asked for; `.ci/run` asks, and says so where one is not
//! seen. When Burn has mended it, the way around it can go.

use burn::tensor::backend::Backend;
use burn::tensor::{Distribution, Tensor};
use fusedkv::backend::{Dispatch, DispatchDevice};

use crate::formula::{off, values};

type Tensor4 = Tensor<Dispatch, 4>;

fn random(dims: [usize; 4]) -> Tensor4 {
    let device = DispatchDevice::Wgpu(Default::default());
    Tensor::random(dims, Distribution::Uniform(-1.0, 1.0), &device)
}

/// How far `lhs · rhs + added` is off, the sum fused into the product.
fn product(matrices: usize, rows: usize, [inner, columns]: [usize; 2], transposed: bool) -> f64 {
    let lhs = random([1, matrices, rows, inner]);
    let rhs = match transposed {
        false => random([1, matrices, inner, columns]),
        true => random([1, matrices, columns, inner]).swap_dims(2, 3),
    };
    let added = random([1, matrices, rows, columns]);
    let [l, r, a] = [&lhs, &rhs, &added].map(values);
    let expected: Vec<f64> = (0..matrices * rows * columns)
        .map(|i| {
            let (row, column) = (i / columns, i % columns);
            let matrix = row / rows;
            let products =
                (0..inner).map(|k| l[row * inner + k] * r[(matrix * inner + k) * columns + column]);
            a[i] + products.sum::<f64>()
        })
        .collect();
    // What follows is a stream of operations by itself.
    Dispatch::sync(&lhs.device()).unwrap();
    off(&values(&(lhs.matmul(rhs) + added)), &expected)
}

/// How far `column[rows] · wide` is off, the selected rows of `[8, 1]` broadcast along `wide`.
fn selected() -> f64 {
    let column = random([8, 1, 1, 1]);
    let wide = random([4, 1, 1, 8]);
    let [c, w] = [&column, &wide].map(values);
    let rows = [3usize, 0, 5, 2];
    let expected: Vec<f64> = (0..32).map(|i| c[rows[i / 8]] * w[i]).collect();
    let rows = Tensor::from_data(rows.map(|row| row as i32), &column.device());
    Dispatch::sync(&column.device()).unwrap();
    off(&values(&(column.select(0, rows) * wide)), &expected)
}

#[test]
#[ignore = "a fault of Burn's: asked for by itself"]
fn selected_rows_of_one_number_are_wrong() {
    assert!(selected() > 0.1);
}

/// Multiples of the units of a plane times the elements of a vector.
const SHAPES: [[usize; 2]; 4] = [[32, 32], [64, 96], [128, 128], [512, 128]];

#[test]
#[ignore = "which kernel is faster decides whether it is seen"]
fn several_products_of_one_row_are_wrong() {
    assert!(
        SHAPES
            .iter()
            .any(|&shape| product(4, 1, shape, false) > 0.1)
    );
}

#[test]
#[ignore = "which kernel is faster decides whether it is seen"]
fn a_product_of_one_row_with_transposed_matrices_is_wrong() {
    assert!(SHAPES.iter().any(|&shape| product(4, 1, shape, true) > 0.1));
}

#[test]
fn other_products_are_right() {
    for shape in SHAPES {
        for (matrices, rows, transposed) in
            [(1, 1, false), (4, 2, false), (1, 2, true), (4, 3, true)]
        {
            let off = product(matrices, rows, shape, transposed);
            assert!(
                off < 1e-4,
                "{matrices} {rows} {shape:?} {transposed}: {off}"
            );
        }
    }
}

/// How far the sum over `dim` of a product with a tensor whose last two dimensions were swapped is
/// off.
fn sum(dims: [usize; 4], dim: usize) -> f64 {
    let [a, b, c, d] = dims;
    let swapped = random([a, b, d, c]).swap_dims(2, 3);
    let weights = random(dims);
    let [s, w] = [&swapped, &weights].map(values);
    let after: usize = dims[dim + 1..].iter().product();
    let before: usize = dims[..dim].iter().product();
    let expected: Vec<f64> = (0..before * after)
        .map(|i| {
            let at = |k: usize| (i / after * dims[dim] + k) * after + i % after;
            (0..dims[dim]).map(|k| s[at(k)] * w[at(k)]).sum()
        })
        .collect();
    Dispatch::sync(&swapped.device()).unwrap();
    off(&values(&(swapped * weights).sum_dim(dim)), &expected)
}

const SUMMED: [[usize; 4]; 3] = [[3, 2, 24, 32], [8, 4, 64, 64], [5, 3, 128, 32]];

#[test]
#[ignore = "which kernel is faster decides whether it is seen"]
fn a_sum_over_the_first_dimension_of_a_transposed_tensor_is_wrong() {
    assert!(SUMMED.iter().any(|&dims| sum(dims, 0) > 0.1));
}

#[test]
fn a_sum_over_what_is_transposed_is_right() {
    for dims in SUMMED {
        for dim in [2, 3] {
            let off = sum(dims, dim);
            assert!(off < 1e-4, "{dims:?} {dim}: {off}");
        }
    }
}
