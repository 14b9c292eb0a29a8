//! The judge of a search: the dense model's runs, made once, and each size against them.

use std::path::Path;

use sdxl_model::checkpoint::Weights;
use sdxl_model::unet::Unet;
use sdxl_pipeline::{PipelineFolder, UnetWeights};
use squeeze_base::error::{Error, Result};
use squeeze_base::progress::Progress;
use squeeze_container::Container;
use squeeze_numerics::device::Placement;

use super::super::judge::{Judge, Reference};
use super::super::results::{Measured, ratio};
use super::goal::Closeness;
use crate::report::Spread;

/// The judge, with what it has to know of the dense model once it is asked.
pub(super) struct Judged<'a> {
    folder: &'a PipelineFolder,
    placement: Placement,
    judge: &'a Judge<'a>,
    weights: &'a Weights,
    /// `None` until the first size is judged: a run that is resumed may judge none.
    reference: Option<Reference<'a>>,
    /// Remarks about the runs.
    notes: Vec<String>,
}

impl<'a> Judged<'a> {
    pub(super) fn new(folder: &'a PipelineFolder, placement: Placement, judge: &'a Judge<'a>, weights: &'a Weights) -> Self {
        Judged { folder, placement, judge, weights, reference: None, notes: Vec::new() }
    }

    /// Measures a container, read back, as a comparison does; the PSNR only with `pictures`.
    ///
    /// # Errors
    /// If the pipeline cannot run, or the container cannot be read.
    pub(super) fn closeness(&mut self, container: &Path, pictures: bool, progress: &dyn Progress) -> Result<Closeness> {
        let (chain, placement) = (&self.folder.unet, self.placement);
        if self.reference.is_none() {
            let unet = Unet::resident(chain.clone(), self.weights.source(placement), progress)?;
            let range = 0..self.judge.pairs().len();
            self.reference = Some(self.judge.record(range, &unet, progress)?);
            self.note("dense runs", unet.beyond_half());
        }
        let reference = self.reference.as_ref().ok_or_else(|| Error::internal("the dense runs were not made"))?;
        let container = Container::open(container)?;
        let unet = Unet::resident(chain.clone(), UnetWeights::from(&container).source(placement), progress)?;
        let measured = match pictures {
            true => reference.measure(&unet, progress)?.measured,
            false => reference.measure_calls(&unet, progress)?,
        };
        let notes = unet.beyond_half();
        drop(unet);
        self.note("judged runs", notes);
        Ok(Closeness {
            unet_error: ratio(measured.iter().flat_map(|picture: &Measured| &picture.calls)),
            psnr: pictures.then(|| Spread::of(measured.iter().map(|picture| picture.psnr).collect()).mean),
        })
    }

    /// Remarks about the runs.
    pub(super) fn into_notes(self) -> Vec<String> {
        self.notes
    }

    fn note(&mut self, runs: &str, texts: Vec<String>) {
        for text in texts.into_iter().map(|text| format!("{runs}: {text}")) {
            if !self.notes.contains(&text) {
                self.notes.push(text);
            }
        }
    }
}
