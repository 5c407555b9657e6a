//! See `tidemark_fuzz::header`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidemark_fuzz::header(data));
