//! Flex against itself in f32: what its kernels do with f16 and bf16.

use burn::tensor::DType;
use fusedkv::CacheDtype;
use fusedkv::backend::{Flex, FlexDevice};

use crate::checks::Subject;

const CACHE_DTYPES: &[CacheDtype] = &[
    CacheDtype::Model,
    CacheDtype::F32,
    CacheDtype::F16,
    CacheDtype::Bf16,
    CacheDtype::Int8,
];

fn subject(dtype: DType) -> Subject<Flex> {
    Subject {
        device: FlexDevice,
        dtype,
        cache_dtypes: CACHE_DTYPES,
        tf32: false,
    }
}

mod f32 {
    use super::*;

    conformance!(Flex, subject(DType::F32));
    conformance!(training Flex, subject(DType::F32));
}

mod f16 {
    use super::*;

    conformance!(Flex, subject(DType::F16));
}

mod bf16 {
    use super::*;

    conformance!(Flex, subject(DType::BF16));
}
