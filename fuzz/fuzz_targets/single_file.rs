#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| sdxl_squeeze_fuzz::single_file::run(data));
