//! Sizes as people write and read them: powers of 1024, as qemu-img has them.

const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

/// Parses `512`, `64K`, `1.5G`: a number and one of `b K M G T P E`, upper or lower case.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let wrong = || format!("'{text}' is not a size: write a number, then K, M, G or T, as in 64K");
    let (number, shift) = match text.char_indices().last() {
        Some((at, unit)) if !unit.is_ascii_digit() => {
            let position = "BKMGTPE"
                .find(unit.to_ascii_uppercase())
                .ok_or_else(wrong)?;
            (text.get(..at).unwrap_or_default(), 10 * position)
        }
        _ => (text, 0),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(fraction) || fraction.len() > 12 {
        return Err(wrong());
    }
    let whole: u128 = whole.parse().map_err(|_| wrong())?;
    let scale = 10_u128.pow(u32::try_from(fraction.len()).unwrap_or(0));
    let part: u128 = if fraction.is_empty() {
        0
    } else {
        fraction.parse().map_err(|_| wrong())?
    };
    let bytes = whole
        .checked_mul(1 << shift)
        .and_then(|bytes| bytes.checked_add((part << shift) / scale))
        .ok_or_else(wrong)?;
    u64::try_from(bytes)
        .ok()
        .filter(|&bytes| i64::try_from(bytes).is_ok())
        .ok_or_else(|| format!("'{text}' is too large: at most 8 EiB can be addressed"))
}

/// Three significant digits and a unit: `232 KiB`, `2.19 MiB`.
pub(crate) fn human(bytes: u64) -> String {
    let mut unit = 0;
    let mut scale: u128 = 1;
    // A unit up as soon as the number would have four digits.
    while u128::from(bytes) >= 1000 * scale && unit + 1 < UNITS.len() {
        unit += 1;
        scale <<= 10;
    }
    let step = match u128::from(bytes) / scale {
        0..10 => 10,
        10..100 => 100,
        _ => 1000,
    };
    // Thousandths, rounded to a multiple of the step, halves to even as printf does.
    let (exact, unit_step) = (u128::from(bytes) * 1000, step * scale);
    let (below, rest) = (exact / unit_step, exact % unit_step);
    let up = rest * 2 > unit_step || (rest * 2 == unit_step && below % 2 == 1);
    let rounded = (below + u128::from(up)) * step;
    let (whole, rest) = (rounded / 1000, rounded % 1000);
    let fraction = format!("{rest:03}");
    let fraction = fraction.trim_end_matches('0');
    let dot = if fraction.is_empty() { "" } else { "." };
    let unit = UNITS.get(unit).unwrap_or(&"B");
    format!("{whole}{dot}{fraction} {unit}")
}

#[cfg(test)]
mod tests {
    use super::{human, parse};

    #[test]
    fn sizes_are_powers_of_1024_with_fractions_as_in_qemu_img() {
        assert_eq!(parse("512"), Ok(512));
        assert_eq!(parse("64K"), Ok(65_536));
        assert_eq!(parse("1.5g"), Ok(3 << 29));
        assert_eq!(parse("4T"), Ok(4 << 40));
        assert_eq!(parse("7E"), Ok(7 << 60));
        for wrong in [
            "",
            "K",
            "1KK",
            "-1",
            "1X",
            "0x10",
            "1.2.3",
            "8E",
            "99999999999999999999",
            "é",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_are_printed_with_three_digits_as_in_qemu_img() {
        assert_eq!(human(0), "0 B");
        assert_eq!(human(512), "512 B");
        assert_eq!(human(237_568), "232 KiB");
        assert_eq!(human(2_297_856), "2.19 MiB");
        assert_eq!(human(10 << 30), "10 GiB");
        assert_eq!(human(1_048_575), "1 MiB");
        assert_eq!(human(918_016), "896 KiB");
    }
}
