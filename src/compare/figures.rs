//! From measurements of single pictures to the figures of a report.

use squeeze_base::error::{Error, Result};

use super::bootstrap::{self, Statistic};
use super::results::{Measured, ModelResults, Results, Share, ratio};
use crate::report::{Comparison, Estimate, Measures, Row, Spread, StageError};

/// The comparison of `frame`, whose rows have no measurements yet, with those of `results`.
///
/// # Errors
/// [`Error::Argument`] if no row has the name of the baseline; [`Error::Internal`] if `results` are
/// not those of every picture.
pub(super) fn figures(mut frame: Comparison, results: Results) -> Result<Comparison> {
    if !results.is_whole(frame.rows.len(), frame.judged.len()) || frame.noise_floor.is_some() != results.noise_floor.is_some() {
        return Err(Error::internal("the results are not those of every picture"));
    }
    let baseline = frame.rows.iter().position(|row| row.name == frame.baseline);
    let baseline = baseline.ok_or_else(|| Error::Argument(format!("no config is named `{}`, the baseline", frame.baseline)))?;
    let prompts = prompts_of(&frame);
    let Results { stages, rows, noise_floor, warnings, dense_pictures } = results;
    let models: Vec<&[Measured]> = rows.iter().chain(&noise_floor).map(|model| model.measured.as_slice()).collect();
    let estimates = estimates(&models, baseline, &prompts)?;
    frame.warnings.extend(once_each(warnings));
    frame.dense.pictures = dense_pictures;
    let all_rows = frame.rows.iter_mut().chain(&mut frame.noise_floor);
    for ((index, row), (model, (means, differences))) in
        all_rows.enumerate().zip(rows.into_iter().chain(noise_floor).zip(estimates))
    {
        row.intervals = means;
        row.differences = differences.filter(|_| index != baseline);
        fill(row, model, &stages, &prompts);
    }
    Ok(frame)
}

/// The pictures of each distinct prompt, in the order of the prompts.
fn prompts_of(frame: &Comparison) -> Vec<Vec<usize>> {
    let mut prompts: Vec<(&str, Vec<usize>)> = Vec::new();
    let mut places = std::collections::HashMap::new();
    for (index, judged) in frame.judged.iter().enumerate() {
        let place = *places.entry(judged.prompt.as_str()).or_insert_with(|| {
            prompts.push((&judged.prompt, Vec::new()));
            prompts.len() - 1
        });
        prompts[place].1.push(index);
    }
    prompts.into_iter().map(|(_, pictures)| pictures).collect()
}

/// Texts without those that came before, sorted: how often a run repeats a remark depends on the
/// parts that it was cut into.
fn once_each(mut texts: Vec<String>) -> Vec<String> {
    texts.sort();
    texts.dedup();
    texts
}

/// Puts a model's measurements into its row.
fn fill(row: &mut Row, model: ModelResults, stages: &[String], prompts: &[Vec<usize>]) {
    let ModelResults { measured, notes, pictures } = model;
    let calls = |pictures: &[usize]| ratio(pictures.iter().flat_map(|index| &measured[*index].calls));
    let steps = measured.first().map_or(0, |first| first.latents.len());
    let mean = |step: usize| measured.iter().map(|picture| picture.latents[step]).sum::<f64>() / measured.len() as f64;
    let stage = |index: usize| ratio(measured.iter().filter_map(|picture| picture.stages.get(index)).flatten());
    let each = |value: fn(&Measured) -> f64| measured.iter().map(value).collect::<Vec<_>>();
    row.unet_error = ratio(measured.iter().flat_map(|picture| &picture.calls));
    row.unet_error_by_prompt = prompts.iter().map(|pictures| calls(pictures)).collect();
    row.latent_error_by_step = (0..steps).map(mean).collect();
    row.latent_error = Spread::of_errors(each(Measured::latent_error));
    row.psnr = Spread::of(each(|picture| picture.psnr));
    row.ssim = Spread::of(each(|picture| picture.ssim));
    row.lpips = measured.iter().map(|picture| picture.lpips).collect::<Option<Vec<_>>>().map(Spread::of_errors);
    if measured.iter().any(|picture| !picture.stages.is_empty()) {
        let named = stages.iter().enumerate();
        row.stages = named.map(|(index, name)| StageError { name: name.clone(), error: stage(index) }).collect();
    }
    row.warnings.extend(once_each(notes).into_iter().map(|note| format!("judged runs: {note}")));
    row.pictures = pictures;
}

impl Measured {
    /// The error of the final latents.
    fn latent_error(&self) -> f64 {
        self.latents.last().copied().unwrap_or(f64::NAN)
    }
}

/// One measure of one prompt's pictures: a mean is a sum over a number.
type ByPrompt = Vec<Share>;

/// The measures of a model, in the order of the fields of [`Measures`].
fn by_prompt(measured: &[Measured], prompts: &[Vec<usize>]) -> Vec<ByPrompt> {
    let means = |value: &dyn Fn(&Measured) -> f64| -> ByPrompt {
        let mean = |pictures: &Vec<usize>| Share {
            off: pictures.iter().map(|index| value(&measured[*index])).sum(),
            all: pictures.len() as f64,
        };
        prompts.iter().map(mean).collect()
    };
    let calls = |pictures: &Vec<usize>| {
        let shares = || pictures.iter().flat_map(|index| &measured[*index].calls);
        Share { off: shares().map(|share| share.off).sum(), all: shares().map(|share| share.all).sum() }
    };
    let mut measures = vec![
        prompts.iter().map(calls).collect(),
        means(&Measured::latent_error),
        means(&|picture| picture.psnr),
        means(&|picture| picture.ssim),
    ];
    if measured.iter().all(|picture| picture.lpips.is_some()) {
        measures.push(means(&|picture| picture.lpips.unwrap_or(f64::NAN)));
    }
    measures
}

/// For each model its means and the differences to the baseline's; none of a single prompt. Noises
/// of one prompt are not independent, so prompts are drawn again as wholes, and all models with the
/// same draws.
fn estimates(
    models: &[&[Measured]],
    baseline: usize,
    prompts: &[Vec<usize>],
) -> Result<Vec<(Option<Measures>, Option<Measures>)>> {
    if prompts.len() < 2 {
        return Ok(vec![(None, None); models.len()]);
    }
    let measures: Vec<Vec<ByPrompt>> = models.iter().map(|measured| by_prompt(measured, prompts)).collect();
    let mean = |shares: &ByPrompt, units: &[usize]| ratio(units.iter().map(|unit| &shares[*unit]));
    let mut statistics: Vec<Box<Statistic<'_>>> = Vec::new();
    for model in &measures {
        for (shares, reference) in model.iter().zip(&measures[baseline]) {
            statistics.push(Box::new(move |units| mean(shares, units)));
            statistics.push(Box::new(move |units| mean(shares, units) - mean(reference, units)));
        }
    }
    let found = bootstrap::intervals(prompts.len(), &statistics, bootstrap::resamples(prompts.len()))?;
    let mut found = found.into_iter();
    let mut pairs = |count: usize| -> (Vec<Estimate>, Vec<Estimate>) {
        let taken: Vec<Estimate> = found.by_ref().take(2 * count).collect();
        (taken.iter().step_by(2).copied().collect(), taken.iter().skip(1).step_by(2).copied().collect())
    };
    let of_models = measures.iter().map(|model| {
        let (means, differences) = pairs(model.len());
        (named(&means), named(&differences))
    });
    Ok(of_models.collect())
}

fn named(estimates: &[Estimate]) -> Option<Measures> {
    let [unet_error, latent_error, psnr, ssim, rest @ ..] = estimates else { return None };
    Some(Measures {
        unet_error: *unet_error,
        latent_error: *latent_error,
        psnr: *psnr,
        ssim: *ssim,
        lpips: rest.first().copied(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Judged;

    fn measured(psnr: f64, latents: [f64; 2], calls: &[(f64, f64)]) -> Measured {
        let shares = || calls.iter().map(|(off, all)| Share { off: *off, all: *all }).collect::<Vec<_>>();
        Measured { psnr, ssim: psnr / 100.0, lpips: None, latents: latents.into(), calls: shares(), stages: vec![shares()] }
    }

    fn frame(prompts: &[&str], rows: &[&str]) -> Comparison {
        Comparison {
            judged: (0..).zip(prompts).map(|(seed, prompt)| Judged { prompt: (*prompt).to_owned(), seed }).collect(),
            rows: rows.iter().map(|name| Row { name: (*name).to_owned(), ..Row::default() }).collect(),
            baseline: rows[0].to_owned(),
            ..Comparison::default()
        }
    }

    fn results(models: Vec<Vec<Measured>>) -> Results {
        let rows = models.into_iter().map(|measured| ModelResults { measured, ..ModelResults::default() });
        Results { stages: vec!["mid_block".to_owned()], rows: rows.collect(), ..Results::default() }
    }

    #[test]
    fn figures_are_sums_over_pictures_and_prompts() {
        // Two prompts with two noises each, and a third with one, which has no held-out call.
        let prompts = ["a", "b", "c", "a", "b"];
        let one = vec![
            measured(30.0, [0.1, 0.2], &[(1.0, 10.0)]),
            measured(20.0, [0.2, 0.4], &[(2.0, 10.0), (1.0, 20.0)]),
            measured(40.0, [0.3, 0.6], &[]),
            measured(32.0, [0.1, 0.2], &[(3.0, 30.0)]),
            measured(28.0, [0.1, 0.1], &[]),
        ];
        let better: Vec<Measured> = one.iter().map(|picture| Measured { psnr: picture.psnr + 1.5, ..picture.clone() }).collect();
        let found = figures(frame(&prompts, &["one", "better"]), results(vec![one, better])).unwrap();
        let row = &found.rows[0];
        assert!((row.unet_error - 0.1).abs() < 1e-12);
        assert!((row.unet_error_by_prompt[0] - 0.1).abs() < 1e-12 && (row.unet_error_by_prompt[1] - 0.1).abs() < 1e-12);
        assert!(row.unet_error_by_prompt[2].is_nan());
        assert!((row.latent_error_by_step[0] - 0.16).abs() < 1e-12 && (row.latent_error_by_step[1] - 0.3).abs() < 1e-12);
        assert_eq!((row.psnr.mean, row.psnr.median, row.psnr.worst), (30.0, 30.0, 20.0));
        assert_eq!((row.latent_error.worst, row.latent_error.median), (0.6, 0.2));
        assert_eq!(row.stages.len(), 1);
        assert!((row.stages[0].error - 0.1).abs() < 1e-12);
        assert_eq!(row.differences, None);
        // Every picture is 1.5 dB better, so on any prompts the difference is 1.5 dB.
        let difference = found.rows[1].differences.unwrap().psnr;
        for value in [difference.value, difference.low, difference.high] {
            assert!((value - 1.5).abs() < 1e-9, "{difference:?}");
        }
        let wide = found.rows[1].intervals.unwrap().psnr;
        assert!(wide.high - wide.low > 5.0, "{wide:?}");
    }

    #[test]
    fn one_prompt_has_no_interval_and_missing_pictures_no_figures() {
        let picture = || measured(30.0, [0.1, 0.2], &[(1.0, 10.0)]);
        let found = figures(frame(&["a", "a"], &["one"]), results(vec![vec![picture(), picture()]])).unwrap();
        assert_eq!((found.rows[0].intervals, found.rows[0].differences), (None, None));
        assert!(figures(frame(&["a", "b"], &["one"]), results(vec![vec![picture()]])).is_err());
        assert!(figures(frame(&["a"], &["one", "two"]), results(vec![vec![picture()]])).is_err());
        let other = Comparison { baseline: "none".into(), ..frame(&["a"], &["one"]) };
        assert!(figures(other, results(vec![vec![picture()]])).unwrap_err().is_bad_input());
    }
}
