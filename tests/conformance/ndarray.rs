//! NdArray: Burn's own operations alone, in f32 and f64.

use burn::tensor::DType;
use burn_ndarray::{NdArray, NdArrayDevice};
use fusedkv::CacheDtype;

use crate::checks::Subject;

mod f32 {
    use super::*;

    const SUBJECT: Subject<NdArray> = Subject {
        device: NdArrayDevice::Cpu,
        dtype: DType::F32,
        cache_dtypes: &[CacheDtype::Model, CacheDtype::F32, CacheDtype::Int8],
        tf32: false,
    };

    conformance!(NdArray, SUBJECT);
    conformance!(training NdArray, SUBJECT);
}

mod f64 {
    use super::*;

    const SUBJECT: Subject<NdArray<f64>> = Subject {
        device: NdArrayDevice::Cpu,
        dtype: DType::F64,
        cache_dtypes: &[CacheDtype::Model, CacheDtype::F32, CacheDtype::Int8],
        tf32: false,
    };

    conformance!(NdArray<f64>, SUBJECT);
}
