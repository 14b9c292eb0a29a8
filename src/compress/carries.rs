//! The recorded carries of all samples between two parts of the network.

use std::path::{Path, PathBuf};

use sdxl_model::checkpoint::SteadyFile;
use sdxl_model::unet::Carry;
use squeeze_base::error::{Error, Result};
use squeeze_numerics::waiting::WaitingTensor;
use tch::{Device, Kind, Tensor};

/// The carries of all samples: in the device's memory, or away from it, in the host's memory or in
/// files. Text states and time embeddings are small and always in the device's memory.
#[derive(Debug)]
pub(super) enum Carries {
    Memory(Vec<Carry>),
    Away(Away),
}

/// Carries away from the memory of the device that computes, tensor by tensor.
#[derive(Debug)]
pub(super) struct Away {
    place: Place,
    rows: Vec<Row>,
    device: Device,
    /// How many residuals, counted from the last, come back with a carry; `None` is all.
    residuals: Option<usize>,
}

/// Where carries are away.
#[derive(Debug)]
enum Place {
    /// In the host's memory.
    Host,
    /// In files of a folder, a file for each tensor.
    Folder(PathBuf),
}

#[derive(Debug)]
struct Row {
    temb: Tensor,
    encoder_hidden_states: Tensor,
    hidden_states: Stored,
    tokens: Option<Stored>,
    residuals: Vec<Stored>,
}

/// A tensor that is away.
#[derive(Debug)]
enum Stored {
    Host(WaitingTensor),
    File(TensorFile),
}

/// A tensor in a file, with its checksum in memory: the file is read back once in every pass, for
/// as long as the run lasts, and neither a fault of the disk nor another program that writes to the
/// folder may change the result.
#[derive(Debug)]
struct TensorFile {
    path: PathBuf,
    size: Vec<i64>,
    kind: Kind,
    checksum: u32,
}

impl TensorFile {
    fn write(path: PathBuf, tensor: &Tensor) -> Result<Self> {
        let tensor = tensor.f_to_device(Device::Cpu)?.f_contiguous()?;
        let kind = tensor.f_kind()?;
        let mut bytes = vec![0; tensor.numel() * kind.elt_size_in_bytes()];
        tensor.f_copy_data_u8(&mut bytes, tensor.numel())?;
        std::fs::write(&path, &bytes).map_err(Error::write(&path))?;
        Ok(TensorFile { path, size: tensor.size(), kind, checksum: crc32fast::hash(&bytes) })
    }

    fn read(&self, device: Device) -> Result<Tensor> {
        let changed = || Error::Changed { path: self.path.clone() };
        let length = self.size.iter().product::<i64>() as usize * self.kind.elt_size_in_bytes();
        let file = SteadyFile::open(&self.path)?;
        if file.bytes() != length as u64 {
            return Err(changed());
        }
        let mut bytes = vec![0; length];
        file.read(&mut bytes, 0)?;
        if crc32fast::hash(&bytes) != self.checksum {
            return Err(changed());
        }
        Ok(Tensor::f_from_data_size(&bytes, &self.size, self.kind)?.f_to_device(device)?)
    }
}

impl Carries {
    /// An empty list in the device's memory.
    pub(super) fn in_memory() -> Self {
        Carries::Memory(Vec::new())
    }

    /// An empty list in the host's memory; carries come back to `device`, which they come from.
    pub(super) fn on_host(device: Device) -> Self {
        Carries::Away(Away { place: Place::Host, rows: Vec::new(), device, residuals: None })
    }

    /// An empty list in files of `folder`, which is created; carries are read back to `device`.
    pub(super) fn in_files(folder: &Path, device: Device) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(Error::write(folder))?;
        Ok(Carries::Away(Away { place: Place::Folder(folder.to_owned()), rows: Vec::new(), device, residuals: None }))
    }

    /// The number of carries.
    pub(super) fn len(&self) -> usize {
        match self {
            Carries::Memory(carries) => carries.len(),
            Carries::Away(away) => away.rows.len(),
        }
    }

    /// Adds the first carry of a batch of samples.
    pub(super) fn push(&mut self, carry: Carry) -> Result<()> {
        match self {
            Carries::Memory(carries) => carries.push(carry),
            Carries::Away(away) => {
                let row = away.store(away.rows.len(), carry, Vec::new())?;
                away.rows.push(row);
            }
        }
        Ok(())
    }

    /// Sets how many residuals, counted from the last, the next passes need; `None` is all. Where
    /// carries are away, tensors without elements stand for the others.
    pub(super) fn need_residuals(&mut self, last: Option<usize>) {
        match self {
            Carries::Memory(_) => {}
            Carries::Away(away) => away.residuals = last,
        }
    }

    /// The carry of the batch `index`.
    pub(super) fn get(&self, index: usize) -> Result<Carry> {
        Ok(match self {
            Carries::Memory(carries) => carries[index].shallow_clone(),
            Carries::Away(away) => {
                let row = &away.rows[index];
                let back = |stored: &Stored| stored.back(away.device);
                let absent = row.residuals.len() - away.residuals.unwrap_or(usize::MAX).min(row.residuals.len());
                let residual = |(number, stored): (usize, &Stored)| {
                    // No operation takes two dimensions for an image's four, and fp16 is not
                    // converted where activations go beyond it.
                    let nothing = || Ok(Tensor::f_empty([0, 0], (Kind::Half, away.device))?);
                    if number < absent { nothing() } else { back(stored) }
                };
                Carry {
                    hidden_states: back(&row.hidden_states)?,
                    tokens: row.tokens.as_ref().map(back).transpose()?,
                    down_block_res_samples: row.residuals.iter().enumerate().map(residual).collect::<Result<_>>()?,
                    temb: row.temb.shallow_clone(),
                    encoder_hidden_states: row.encoder_hidden_states.shallow_clone(),
                }
            }
        })
    }

    /// Replaces the carry `index` by the output of a stage or block. Stages push residuals or pop
    /// them; the other residuals are unchanged and not stored again.
    pub(super) fn replace(&mut self, index: usize, carry: Carry) -> Result<()> {
        match self {
            Carries::Memory(carries) => carries[index] = carry,
            Carries::Away(away) => {
                let residuals = std::mem::take(&mut away.rows[index].residuals);
                away.rows[index] = away.store(index, carry, residuals)?;
            }
        }
        Ok(())
    }
}

impl Away {
    /// Stores the new tensors of a carry; `residuals` are those that are stored already.
    fn store(&self, index: usize, carry: Carry, mut residuals: Vec<Stored>) -> Result<Row> {
        let store = |what: &str, tensor: &Tensor| self.place.store(&format!("{index:05}-{what}"), tensor);
        for popped in residuals.drain(carry.down_block_res_samples.len().min(residuals.len())..) {
            popped.remove()?;
        }
        for (number, residual) in carry.down_block_res_samples.iter().enumerate().skip(residuals.len()) {
            residuals.push(store(&format!("residual-{number:02}"), residual)?);
        }
        Ok(Row {
            hidden_states: store("hidden", &carry.hidden_states)?,
            tokens: carry.tokens.as_ref().map(|tokens| store("tokens", tokens)).transpose()?,
            residuals,
            temb: carry.temb,
            encoder_hidden_states: carry.encoder_hidden_states,
        })
    }
}

impl Place {
    fn store(&self, name: &str, tensor: &Tensor) -> Result<Stored> {
        match self {
            Place::Host => Ok(Stored::Host(WaitingTensor::of(tensor)?)),
            Place::Folder(folder) => Ok(Stored::File(TensorFile::write(folder.join(name), tensor)?)),
        }
    }
}

impl Stored {
    fn back(&self, device: Device) -> Result<Tensor> {
        match self {
            Stored::Host(waiting) => waiting.back(),
            Stored::File(file) => file.read(device),
        }
    }

    /// Removes the file, if it is one.
    fn remove(&self) -> Result<()> {
        match self {
            Stored::Host(_) => Ok(()),
            Stored::File(TensorFile { path, .. }) => std::fs::remove_file(path).map_err(Error::write(path)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn carry(seed: f64, residuals: i64) -> Carry {
        let tensor = |n: i64| Tensor::arange(n * 4, (Kind::Float, Device::Cpu)).reshape([1, n, 2, 2]) + seed;
        Carry {
            hidden_states: tensor(3) * 2.0,
            tokens: (residuals == 3).then(|| tensor(7)),
            down_block_res_samples: (1..=residuals).map(tensor).collect(),
            temb: tensor(1),
            encoder_hidden_states: tensor(2).to_kind(Kind::Half),
        }
    }

    fn equal(a: &Carry, b: &Carry) -> bool {
        a.hidden_states == b.hidden_states
            && a.tokens == b.tokens
            && a.down_block_res_samples == b.down_block_res_samples
            && a.temb == b.temb
            && a.encoder_hidden_states == b.encoder_hidden_states
    }

    #[test]
    fn files_and_the_host_give_back_what_memory_does() {
        let folder = tempfile::tempdir().unwrap();
        let mut in_files = Carries::in_files(&folder.path().join("carries"), Device::Cpu).unwrap();
        let mut on_host = Carries::on_host(Device::Cpu);
        let mut in_memory = Carries::in_memory();
        for carries in [&mut in_files, &mut on_host, &mut in_memory] {
            for index in 0..3 {
                carries.push(carry(f64::from(index), 2)).unwrap();
            }
            // A down stage pushes, an up stage pops.
            for residuals in [4, 3, 0] {
                for index in 0..3 {
                    carries.replace(index, carry(index as f64, residuals)).unwrap();
                }
            }
            carries.replace(1, carry(1.0, 1)).unwrap();
            assert_eq!(carries.len(), 3);
        }
        for index in 0..3 {
            for away in [&in_files, &on_host] {
                assert!(equal(&away.get(index).unwrap(), &in_memory.get(index).unwrap()), "{index}");
            }
        }
        // A block that takes one residual is given one, and the others stay as they are.
        for away in [&mut in_files, &mut on_host] {
            away.replace(0, carry(5.0, 3)).unwrap();
            away.need_residuals(Some(1));
            let mut some = away.get(0).unwrap();
            let numels: Vec<usize> = some.down_block_res_samples.iter().map(Tensor::numel).collect();
            assert_eq!(numels, [0, 0, 12]);
            some.down_block_res_samples.pop();
            away.replace(0, some).unwrap();
            away.need_residuals(None);
            let mut expected = carry(5.0, 3);
            expected.down_block_res_samples.pop();
            assert_eq!(away.get(0).unwrap().down_block_res_samples[1], expected.down_block_res_samples[1]);
            away.replace(0, carry(0.0, 0)).unwrap();
        }
        // Any flipped bit is found.
        let path = folder.path().join("carries/00002-hidden");
        let whole = std::fs::read(&path).unwrap();
        for bit in 0..8 * whole.len() {
            let mut damaged = whole.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&path, &damaged).unwrap();
            assert!(matches!(in_files.get(2), Err(Error::Changed { .. })), "bit {bit}");
        }
        std::fs::write(&path, &whole[1..]).unwrap();
        assert!(matches!(in_files.get(2), Err(Error::Changed { .. })));
        // Three hidden states, three tokens that are stale, one residual.
        assert_eq!(std::fs::read_dir(folder.path().join("carries")).unwrap().count(), 7);
    }
}
