//! The only file of this module that knows libtorch: conversion of its errors.

use super::Error;

impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        Error::Torch(error.to_string())
    }
}
