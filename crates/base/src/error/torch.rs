//! The only file of this module that knows libtorch: conversion of its errors.

use tch::TchError;

use super::{Error, first_line};

impl From<TchError> for Error {
    fn from(error: TchError) -> Self {
        match error {
            TchError::Torch(text) if is_out_of_memory(&text) => Error::OutOfMemory { step: None, text },
            error => Error::Torch(error.to_string()),
        }
    }
}

/// Whether libtorch's text says that a device has no memory left. The allocators of CUDA and of
/// Metal say so in words; cuBLAS and cuDNN have a status for it.
fn is_out_of_memory(text: &str) -> bool {
    ["out of memory", "STATUS_ALLOC_FAILED"].iter().any(|words| first_line(text).contains(words))
}
