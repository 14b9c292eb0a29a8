#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| sdxl_squeeze_fuzz::lora::run(data));
