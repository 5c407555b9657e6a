//! See `tidemark_fuzz::table`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidemark_fuzz::table(data));
