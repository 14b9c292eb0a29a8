//! The bounds of each value. Messages continue the key's name: "must be …".

use sdxl_model::scheduler::SchedulerChoice;
use squeeze_base::input::prompt_of_length;
use squeeze_codebook::{BitWidth, NmRatio};
use squeeze_numerics::device::parse_dtype;

type Checked<T> = Result<T, String>;

/// A share of weights to set to zero: [0, 1). At 1 nothing would be left.
pub(super) fn target_sparsity(value: f64) -> Checked<f64> {
    if (0.0..1.0).contains(&value) { Ok(value) } else { Err("must be at least 0 and less than 1".into()) }
}

/// The palette sizes that Core ML stores: 2^n entries.
pub(super) fn n_bits(value: i128) -> Checked<BitWidth> {
    let width = BitWidth::ALL.into_iter().find(|width| i128::from(width.bits()) == value);
    width.ok_or_else(|| format!("must be {}", BitWidth::choices("or")))
}

/// The numbers of output channels that may share an index, ascending: those that divide SDXL's
/// channels and that Apple tests.
pub(super) const VECTOR_LENGTHS: [usize; 3] = [1, 2, 4];

/// The number of output channels that share an index.
pub(super) fn cluster_dim(value: i128) -> Checked<usize> {
    let length = VECTOR_LENGTHS.into_iter().find(|length| *length as i128 == value);
    length.ok_or_else(|| "must be 1, 2 or 4".into())
}

/// The weight's dimension whose channels are grouped: 0 for output, 1 for input channels.
pub(super) fn channel_axis(value: i128) -> Checked<usize> {
    match value {
        0 => Ok(0),
        1 => Ok(1),
        _ => Err("must be 0 (output channels) or 1 (input channels)".into()),
    }
}

/// A count of at least 1 that fits a tensor's dimension.
pub(super) fn count(value: i128) -> Checked<usize> {
    match u32::try_from(value) {
        Ok(value) if value > 0 => usize::try_from(value).map_err(|_| "is too large".into()),
        _ => Err(format!("must be between 1 and {}", u32::MAX)),
    }
}

/// A number of repetitions, 0 included.
pub(super) fn steps(value: i128) -> Checked<usize> {
    usize::try_from(value).ok().filter(|value| *value <= 1000).ok_or_else(|| "must be between 0 and 1000".into())
}

/// A number of elements, 0 included.
pub(super) fn elements(value: i128) -> Checked<u64> {
    u64::try_from(value).map_err(|_| format!("must be between 0 and {}", u64::MAX))
}

/// A picture's height or width.
pub(super) fn pixels(value: i128) -> Checked<i64> {
    count(value).and_then(|value| i64::try_from(value).map_err(|_| "is too large".into()))
}

/// A finite number of at least 0.
pub(super) fn not_negative(value: f64) -> Checked<f64> {
    // Adding 0 makes -0 a plain 0.
    if value >= 0.0 && value.is_finite() { Ok(value + 0.0) } else { Err("must be at least 0 and finite".into()) }
}

/// A share from 0 to 1.
pub(super) fn share(value: f64) -> Checked<f64> {
    if (0.0..=1.0).contains(&value) { Ok(value + 0.0) } else { Err("must be between 0 and 1".into()) }
}

/// A sampler's name.
pub(super) fn scheduler(name: &str) -> Checked<String> {
    name.parse::<SchedulerChoice>().map(|_| name.to_owned()).map_err(|why| format!("cannot be taken: {why}"))
}

/// A prompt of a length that is read.
pub(super) fn prompt(text: &str) -> Checked<String> {
    prompt_of_length("it", text).map(|()| text.to_owned()).map_err(|problem| format!("is too long: {problem}"))
}

/// The message about a ratio that is none.
pub(super) const NM_RATIO: &str = "must be n:m with 0 < n < m (of every m weights in a row, n are zero)";

/// Of every `m` columns, `n` are zero.
pub(super) fn n_m_ratio(n: i128, m: i128) -> Checked<NmRatio> {
    match (usize::try_from(n), u32::try_from(m)) {
        (Ok(n), Ok(m)) if 0 < n && n < m as usize => Ok(NmRatio { n, m: m as usize }),
        _ => Err(NM_RATIO.into()),
    }
}

/// `2:4`.
pub(super) fn n_m_text(text: &str) -> Checked<NmRatio> {
    let pair = text.split_once(':').and_then(|(n, m)| Some((n.trim().parse().ok()?, m.trim().parse().ok()?)));
    let (n, m) = pair.ok_or("must be n:m, such as 2:4")?;
    n_m_ratio(n, m)
}

/// Groups of m columns must not straddle the solver's blocks: coremltools gets the counts wrong
/// there.
pub(super) fn whole_groups(NmRatio { n, m }: NmRatio, block: usize) -> Checked<()> {
    if block.is_multiple_of(m) {
        Ok(())
    } else {
        Err(format!("{n}:{m} needs a `processing_group_size` that is a multiple of {m}, not {block}"))
    }
}

/// A device's name. Whether this machine has the device is checked when a run begins.
pub(super) fn device(name: &str) -> Checked<String> {
    let numbered = |name: &str| name.strip_prefix("cuda:").is_some_and(|index| index.parse::<u16>().is_ok());
    let known = |name: &str| matches!(name, "cpu" | "cuda" | "mps") || numbered(name);
    if name.split(',').all(|name| known(name.trim())) {
        Ok(name.to_owned())
    } else {
        Err("must be cpu, cuda, cuda:N or mps, or several of them with commas".into())
    }
}

/// A dtype's name.
pub(super) fn dtype(name: &str) -> Checked<String> {
    parse_dtype(name).map(|_| name.to_owned()).map_err(|_| "must be f32, f16 or bf16".into())
}

/// A size such as `933MiB`.
pub(super) fn bytes(text: &str) -> Checked<u64> {
    squeeze_base::memory::parse_size(text).map_err(|_| "must be a size such as 933MiB or 1.2GiB".into())
}

/// Mean bits of a weight.
pub(super) fn target_bits(value: f64) -> Checked<f64> {
    if value > 0.0 && value <= 16.0 { Ok(value) } else { Err("must be above 0 and at most 16".into()) }
}

/// The message about a percentage that is none.
pub(super) const PERCENTAGE: &str = "must be a percentage above 0% and below 100%, such as 0.5%";

/// A percentage with its sign: `0.5%` is 0.5.
pub(super) fn percentage(text: &str) -> Checked<f64> {
    let digits = text.trim().strip_suffix('%').map(str::trim).filter(|digits| !digits.contains(['+', '-', 'e', 'E']));
    let value = digits.and_then(|digits| digits.parse::<f64>().ok());
    value.filter(|percent| *percent > 0.0 && *percent < 100.0).ok_or_else(|| PERCENTAGE.into())
}

/// A peak signal-to-noise ratio that pictures can reach without being equal.
pub(super) fn decibels(value: f64) -> Checked<f64> {
    if value > 0.0 && value < 100.0 { Ok(value) } else { Err("must be above 0 and below 100".into()) }
}

/// A number of compressions, each of which takes as long as a run.
pub(super) fn solves(value: i128) -> Checked<usize> {
    usize::try_from(value).ok().filter(|value| (1..=100).contains(value)).ok_or_else(|| "must be between 1 and 100".into())
}

/// Text that is not blank: a path or a prompt.
pub(super) fn not_blank(text: &str) -> Checked<&str> {
    if text.trim().is_empty() { Err("must not be empty".into()) } else { Ok(text) }
}
