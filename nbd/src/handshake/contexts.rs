//! Which metadata contexts a query means.

/// Indexes into `available` of what `query` means, in order. A query that ends with a colon is
/// all below it, but only in a list.
pub(crate) fn matching(available: &[String], query: &[u8], listing: bool) -> Vec<usize> {
    let below = listing && query.ends_with(b":");
    let wanted = |name: &String| {
        let name = name.as_bytes();
        name == query || (below && name.starts_with(query))
    };
    let numbered = available.iter().enumerate();
    let found = numbered.filter(|(_, name)| wanted(name));
    found.map(|(number, _)| number).collect()
}

#[cfg(test)]
mod tests {
    use super::matching;

    #[test]
    fn a_namespace_is_a_wildcard_only_in_lists() {
        let names = [
            "base:allocation",
            "qemu:allocation-depth",
            "qemu:dirty-bitmap:a",
            "qemu:dirty-bitmap:b",
        ]
        .map(ToOwned::to_owned);
        let cases: [(&[u8], &[usize], &[usize]); 9] = [
            (b"base:allocation", &[0], &[0]),
            (b"base:", &[0], &[]),
            (b"qemu:", &[1, 2, 3], &[]),
            (b"qemu:dirty-bitmap:", &[2, 3], &[]),
            (b"qemu:dirty-bitmap:b", &[3], &[3]),
            (b"qemu:dirty-bitmap", &[], &[]),
            (b"", &[], &[]),
            (b"base", &[], &[]),
            (b"\xff:", &[], &[]),
        ];
        for (query, listed, set) in cases {
            assert_eq!(matching(&names, query, true), listed, "{query:?}");
            assert_eq!(matching(&names, query, false), set, "{query:?}");
        }
    }
}
