//! Which addresses the worker may connect to: those of the public Internet, and what the administrator opens beyond.
//!
//! The address is judged that is connected to, not the name in the URL: a name may resolve to anything.

use ipnet::IpNet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

const CGNAT: &str = "a carrier-grade NAT address";
const DOCUMENTATION: &str = "a documentation address";
const LINK_LOCAL: &str = "a link-local address";
const LOOPBACK: &str = "a loopback address";
const METADATA: &str = "a cloud metadata address";
const MULTICAST: &str = "a multicast address";
const PRIVATE: &str = "a private address";
const RESERVED: &str = "a reserved address";
const UNSPECIFIED: &str = "an unspecified address";

/// What an entry looks like, for those who wrote another.
const EXAMPLES: &str = "example.com, *.example.com:443, 10.0.0.0/8, 127.0.0.1:8000-8999 or [fd00::/8]:443";

/// What `nexus_hub.egress_allow` opens beyond the public Internet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy(Vec<Entry>);

/// A target, at some ports or at all.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    target: Target,
    ports: Option<RangeInclusive<u16>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Target {
    /// A host of that name, whatever its address.
    Name(String),
    /// A host of any name below that one.
    Below(String),
    /// An address in that network, whatever the name. An IPv4 network also holds the IPv6 addresses that carry one of
    /// its own; an IPv6 network holds no address that is written in IPv4.
    Network(IpNet),
}

impl Policy {
    /// Reads a list separated by commas or white space. An entry is a host, `*.` and a domain, an address or a CIDR,
    /// with a port or a range of ports if need be. The problem, if there is one, names the entry.
    pub fn parse(text: &str) -> Result<Self, String> {
        let entries = text.split(|c: char| c == ',' || c.is_whitespace()).filter(|entry| !entry.is_empty());
        let read = |entry: &str| {
            Entry::parse(entry).map_err(|problem| {
                let shown: String = entry.chars().take(80).collect();
                format!("cannot read \"{shown}\": {problem}; an entry looks like {EXAMPLES}")
            })
        };
        entries.map(read).collect::<Result<_, _>>().map(Self)
    }

    /// Why a connection to `address` is refused; `None` when it is allowed. `host` is the URL's, a name or the address
    /// itself. Where the `port` is not known, only entries without ports count.
    pub fn refusal(&self, host: &str, port: Option<u16>, address: IpAddr) -> Option<&'static str> {
        let kind = kind(address)?;
        let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
        (!self.0.iter().any(|entry| entry.opens(&host, port, address))).then_some(kind)
    }
}

impl Entry {
    fn parse(text: &str) -> Result<Self, String> {
        if text.contains("://") {
            return Err("write it without the scheme".into());
        }
        if let Some(rest) = text.strip_prefix('[') {
            let (inside, after) = rest.split_once(']').ok_or("the closing bracket is missing")?;
            let target = network(inside)?;
            if target.addr().is_ipv4() {
                return Err("brackets are for IPv6".into());
            }
            let ports = match after.strip_prefix(':') {
                Some(text) => Some(ports(text)?),
                None if after.is_empty() => None,
                None => return Err("only a port can follow the bracket, a prefix length stands inside".into()),
            };
            return Ok(Self { target: Target::Network(target), ports });
        }
        // More than one colon is IPv6, whose ports can only be told from it by brackets.
        match text.split_once(':') {
            Some((_, rest)) if rest.contains(':') => Ok(Self { target: Target::Network(network(text)?), ports: None }),
            Some((target, text)) => Ok(Self { target: Target::parse(target)?, ports: Some(ports(text)?) }),
            None => Ok(Self { target: Target::parse(text)?, ports: None }),
        }
    }

    /// Whether this opens a host, whose name is in lower case and without a final dot.
    fn opens(&self, host: &str, port: Option<u16>, address: IpAddr) -> bool {
        let at_port = self.ports.as_ref().is_none_or(|ports| port.is_some_and(|port| ports.contains(&port)));
        at_port
            && match &self.target {
                Target::Name(name) => host == name,
                Target::Below(name) => host
                    .strip_suffix(name.as_str())
                    .and_then(|below| below.strip_suffix('.'))
                    .is_some_and(|below| !below.is_empty()),
                Target::Network(network) => {
                    network.contains(&address) || carried(address).is_some_and(|v4| network.contains(&IpAddr::V4(v4)))
                }
            }
    }
}

impl Target {
    fn parse(text: &str) -> Result<Self, String> {
        if text == "*" {
            return Err("to open every address, write 0.0.0.0/0 and ::/0".into());
        }
        if let Some(parent) = text.strip_prefix("*.") {
            return Ok(Self::Below(name(parent)?));
        }
        if text.contains('/') || text.parse::<Ipv4Addr>().is_ok() {
            return Ok(Self::Network(network(text)?));
        }
        Ok(Self::Name(name(text)?))
    }
}

/// Reads a host name (RFC 1123, 2.1, but with the underscores that Docker and Windows have in theirs) into lower case.
fn name(text: &str) -> Result<String, String> {
    let name = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
    if name.is_empty() {
        return Err("the host is missing".into());
    }
    if !name.is_ascii() {
        return Err("write an international name in its ASCII form, which has xn-- in it".into());
    }
    if name.contains('*') {
        return Err("a * can only be the whole of the first part, as in *.example.com".into());
    }
    if let Some(c) = name.chars().find(|c| !(c.is_ascii_alphanumeric() || "-_.".contains(*c))) {
        return Err(format!("a host name cannot contain {c:?}"));
    }
    if name.len() > 253 {
        return Err("a host name has at most 253 characters".into());
    }
    for label in name.split('.') {
        if label.is_empty() || label.len() > 63 {
            return Err("each part of a host name has 1 to 63 characters".into());
        }
        if label.starts_with('-') || label.ends_with('-') {
            return Err("no part of a host name can begin or end with a hyphen".into());
        }
    }
    if ends_in_a_number(&name) {
        return Err("it ends in a number, as only addresses do: write the dotted address, such as 127.0.0.1".into());
    }
    Ok(name)
}

/// Whether a URL's parser takes a name for an IPv4 address (WHATWG URL, "ends in a number checker"): so an entry for it
/// would never be met.
fn ends_in_a_number(name: &str) -> bool {
    let last = name.rsplit('.').next().unwrap_or(name);
    last.bytes().all(|byte| byte.is_ascii_digit())
        || last.strip_prefix("0x").is_some_and(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// Reads an address or a CIDR.
fn network(text: &str) -> Result<IpNet, String> {
    let (address, prefix) = text.split_once('/').map_or((text, None), |(address, prefix)| (address, Some(prefix)));
    if prefix.is_some_and(|prefix| prefix.contains(':')) {
        return Err("with a port, IPv6 stands in brackets".into());
    }
    let address: IpAddr = address.parse().map_err(|_| match prefix {
        Some(_) => "what stands before the / is no IP address, and a path is no part of an entry",
        None => "it is no IP address (with a port, IPv6 stands in brackets)",
    })?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    let network = prefix
        .map_or(Some(longest), number)
        .and_then(|prefix| IpNet::new(address, prefix).ok())
        .ok_or_else(|| format!("the prefix length is a number from 0 to {longest}"))?;
    if network.network() != address {
        return Err(format!("it has bits set after its prefix, the network is {}", network.trunc()));
    }
    Ok(network)
}

/// Reads a port or a range of ports.
fn ports(text: &str) -> Result<RangeInclusive<u16>, String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let port = |text| number(text).filter(|port| *port != 0);
    match (port(first), port(last)) {
        (Some(first), Some(last)) if first <= last => Ok(first..=last),
        (Some(_), Some(_)) => Err(format!("the port range {text} is empty")),
        _ => Err("a port is a number from 1 to 65535, or a range of them such as 8000-8999".into()),
    }
}

/// Reads digits. `FromStr` would take a sign, too.
fn number<T: std::str::FromStr>(text: &str) -> Option<T> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// What makes an address not public; `None` when nothing does.
fn kind(address: IpAddr) -> Option<&'static str> {
    match address {
        IpAddr::V4(address) => v4_kind(address),
        IpAddr::V6(address) => v6_kind(address),
    }
}

/// Judges by the IANA IPv4 Special-Purpose Address Registry (RFC 6890), and by where clouds hand out credentials: one
/// of those addresses, 168.63.129.16, is in a public range.
fn v4_kind(address: Ipv4Addr) -> Option<&'static str> {
    Some(match address.octets() {
        // AWS and most others; Tencent, Scaleway; ECS and EKS; Alibaba; Azure; Oracle.
        [169, 254, 169, 254] | [169, 254, 0, 23] | [169, 254, 42, 42] | [169, 254, 170, 2 | 23] => METADATA,
        [100, 100, 100, 200] | [168, 63, 129, 16] | [192, 0, 0, 192] => METADATA,
        [0, 0, 0, 0] => UNSPECIFIED,
        [10, ..] | [172, 16..=31, ..] | [192, 168, ..] => PRIVATE,
        [100, 64..=127, ..] => CGNAT,
        [127, ..] => LOOPBACK,
        [169, 254, ..] => LINK_LOCAL,
        [192, 0, 2, _] | [198, 51, 100, _] | [203, 0, 113, _] => DOCUMENTATION,
        [198, 18..=19, ..] => "a benchmarking address",
        [224..=239, ..] => MULTICAST,
        [255, 255, 255, 255] => "a broadcast address",
        [0, ..] | [192, 0, 0, _] | [192, 88, 99, _] | [240..=255, ..] => RESERVED,
        _ => return None,
    })
}

/// Judges by the IANA IPv6 Special-Purpose Address Registry and by the IPv6 Address Space registry: only 2000::/3 is
/// handed out. An address with an IPv4 one in it is no better than that.
fn v6_kind(address: Ipv6Addr) -> Option<&'static str> {
    Some(match address.segments() {
        // EC2, EKS, Google, Scaleway, OpenStack.
        [0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254 | 0x23] | [0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254] => METADATA,
        [0xfd00, 0x42, 0, 0, 0, 0, 0, 0x42] | [0xfe80, 0, 0, 0, 0, 0, 0xa9fe, 0xa9fe] => METADATA,
        [0, 0, 0, 0, 0, 0, 0, 0] => UNSPECIFIED,
        [0, 0, 0, 0, 0, 0, 0, 1] => LOOPBACK,
        // IPv4-compatible, IPv4-mapped, NAT64.
        [0, 0, 0, 0, 0, 0 | 0xffff, high, low] | [0x64, 0xff9b, 0, 0, 0, 0, high, low] => {
            return v4_kind(v4(high, low));
        }
        // 6to4.
        [0x2002, high, low, ..] => return v4_kind(v4(high, low)),
        [0x64, 0xff9b, 1, ..] => "a local NAT64 address",
        [0x100, 0, 0, 0, ..] => "a discard address",
        [0x2001, 0, ..] => "a Teredo address",
        [0x2001, 0..=0x1ff, ..] => RESERVED,
        [0x2001, 0xdb8, ..] | [0x3fff, 0..=0xfff, ..] => DOCUMENTATION,
        [0x2000..=0x3fff, ..] => return None,
        [0x5f00, ..] => "a segment routing address",
        [0xfc00..=0xfdff, ..] => PRIVATE,
        [0xfe80..=0xfebf, ..] => LINK_LOCAL,
        [0xfec0..=0xfeff, ..] => "a site-local address",
        [0xff00..=0xffff, ..] => MULTICAST,
        _ => RESERVED,
    })
}

/// The IPv4 address that a connection to an IPv4-mapped or NAT64 address arrives at. (6to4 only passes through one on
/// the way to another host, and nothing carries IPv4-compatible addresses any more.)
fn carried(address: IpAddr) -> Option<Ipv4Addr> {
    let IpAddr::V6(address) = address else { return None };
    match address.segments() {
        [0, 0, 0, 0, 0, 0xffff, high, low] | [0x64, 0xff9b, 0, 0, 0, 0, high, low] => Some(v4(high, low)),
        _ => None,
    }
}

fn v4(high: u16, low: u16) -> Ipv4Addr {
    Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BENCHMARKING: &str = "a benchmarking address";
    const BROADCAST: &str = "a broadcast address";

    /// What is not public, in the notation of IANA's registry. The first network that holds an address counts.
    const V4: [(&str, &str); 12] = [
        (METADATA, "169.254.169.254/32 169.254.0.23/32 169.254.42.42/32 169.254.170.2/32 169.254.170.23/32"),
        (METADATA, "100.100.100.200/32 168.63.129.16/32 192.0.0.192/32"),
        (UNSPECIFIED, "0.0.0.0/32"),
        (PRIVATE, "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16"),
        (CGNAT, "100.64.0.0/10"),
        (LOOPBACK, "127.0.0.0/8"),
        (LINK_LOCAL, "169.254.0.0/16"),
        (DOCUMENTATION, "192.0.2.0/24 198.51.100.0/24 203.0.113.0/24"),
        (BENCHMARKING, "198.18.0.0/15"),
        (MULTICAST, "224.0.0.0/4"),
        (BROADCAST, "255.255.255.255/32"),
        (RESERVED, "0.0.0.0/8 192.0.0.0/24 192.88.99.0/24 240.0.0.0/4"),
    ];
    const V6: [(&str, &str); 14] = [
        (METADATA, "fd00:ec2::254/128 fd00:ec2::23/128 fd20:ce::254/128 fd00:42::42/128 fe80::a9fe:a9fe/128"),
        (UNSPECIFIED, "::/128"),
        (LOOPBACK, "::1/128"),
        ("a local NAT64 address", "64:ff9b:1::/48"),
        ("a discard address", "100::/64"),
        ("a Teredo address", "2001::/32"),
        (RESERVED, "2001::/23"),
        (DOCUMENTATION, "2001:db8::/32 3fff::/20"),
        ("a segment routing address", "5f00::/16"),
        (PRIVATE, "fc00::/7"),
        (LINK_LOCAL, "fe80::/10"),
        ("a site-local address", "fec0::/10"),
        (MULTICAST, "ff00::/8"),
        (RESERVED, "::/3 4000::/2 8000::/1"),
    ];

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap_or_else(|_| panic!("{text}"))
    }

    fn networks(rows: &[(&'static str, &str)]) -> Vec<(&'static str, IpNet)> {
        let read = |text: &str| text.parse().unwrap_or_else(|_| panic!("{text}"));
        rows.iter().flat_map(|(kind, list)| list.split(' ').map(move |text| (*kind, read(text)))).collect()
    }

    fn step(address: IpAddr, by: i8) -> IpAddr {
        match address {
            IpAddr::V4(v4) => Ipv4Addr::from_bits(v4.to_bits().wrapping_add_signed(by.into())).into(),
            IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits().wrapping_add_signed(by.into())).into(),
        }
    }

    /// The first and the last address of each network, the one before and the one after, and what to expect of them.
    fn edges(rows: &[(&'static str, &str)]) -> Vec<(IpAddr, Option<&'static str>)> {
        let networks = networks(rows);
        let edges = networks.iter().flat_map(|(_, network)| {
            let (first, last) = (network.network(), network.broadcast());
            [step(first, -1), first, last, step(last, 1)]
        });
        let expected = |address: &IpAddr| networks.iter().find(|(_, network)| network.contains(address));
        edges.map(|address| (address, expected(&address).map(|(kind, _)| *kind))).collect()
    }

    /// What is refused without an entry.
    fn by_default(address: &str) -> Option<&'static str> {
        Policy::default().refusal("a.example", Some(443), ip(address))
    }

    /// Whether the entries open an address, reached as that host at that port.
    fn opens(entries: &str, host: &str, port: Option<u16>, address: &str) -> bool {
        let policy = Policy::parse(entries).unwrap_or_else(|problem| panic!("{problem}"));
        policy.refusal(host, port, ip(address)).is_none()
    }

    /// Whether the entries open an address, whatever the host.
    fn reaches(entries: &str, address: &str) -> bool {
        opens(entries, "a.example", Some(443), address)
    }

    fn problem(entry: &str) -> String {
        Policy::parse(entry).err().unwrap_or_else(|| panic!("{entry} is taken"))
    }

    #[test]
    fn each_special_range_is_refused_from_its_first_address_to_its_last() {
        for (address, expected) in [edges(&V4), edges(&V6)].concat() {
            assert_eq!(by_default(&address.to_string()), expected, "{address}");
        }
    }

    #[test]
    fn public_addresses_are_allowed() {
        for address in ["1.0.0.0", "1.1.1.1", "9.255.255.255", "192.0.1.0", "192.31.196.1", "223.255.255.255"] {
            assert_eq!(by_default(address), None, "{address}");
        }
        for address in
            ["2000::", "2001:200::", "2001:4860:4860::8888", "2606:4700::1111", "2a00::1", "3ffe::", "3fff:1000::"]
        {
            assert_eq!(by_default(address), None, "{address}");
        }
    }

    #[test]
    fn an_embedded_address_is_judged_as_itself() {
        for (address, expected) in edges(&V4) {
            let IpAddr::V4(v4) = address else { continue };
            let [a, b, c, d] = v4.octets();
            let six_to_four = format!("2002:{a:02x}{b:02x}:{c:02x}{d:02x}:1::1");
            for text in [format!("::ffff:{v4}"), format!("64:ff9b::{v4}"), six_to_four] {
                assert_eq!(by_default(&text), expected, "{text}");
            }
            // Two of these are IPv6's own.
            if v4.to_bits() > 1 {
                assert_eq!(by_default(&format!("::{v4}")), expected, "::{v4}");
            }
        }
    }

    #[test]
    fn what_only_resembles_an_embedded_address_is_reserved() {
        for address in ["::1:808:808", "::fffe:808:808", "::1:ffff:808:808", "::ffff:0:808:808"] {
            assert_eq!(by_default(address), Some(RESERVED), "{address}");
        }
        for address in ["64:ff9a::808:808", "64:ff9c::808:808", "64:ff9b::1:808:808", "64:ff9b:0:1::808:808"] {
            assert_eq!(by_default(address), Some(RESERVED), "{address}");
        }
        assert_eq!(by_default("2001:ffff:7f00:1::"), None);
        assert_eq!(by_default("2003:7f00:1::"), None);
    }

    #[test]
    fn a_name_opens_whatever_it_resolves_to() {
        for (entry, host) in [
            ("db.example.com", "db.example.com"),
            ("DB.Example.com.", "db.example.COM"),
            ("db.example.com", "db.example.com."),
            ("localhost", "LOCALHOST"),
            ("my_service", "my_service"),
            ("xn--bcher-kva.example", "xn--bcher-kva.example"),
            ("4u.example", "4u.example"),
            ("0x.example", "0x.example"),
        ] {
            for address in ["127.0.0.1", "10.1.2.3", "169.254.169.254", "::1", "fd00::1"] {
                assert!(opens(entry, host, Some(80), address), "{entry} {host} {address}");
            }
        }
        for host in
            ["example.com", "x.db.example.com", "xdb.example.com", "db.example.com.evil.example", "", "10.0.0.1"]
        {
            assert!(!opens("db.example.com", host, Some(80), "10.0.0.1"), "{host}");
        }
    }

    #[test]
    fn a_wildcard_opens_the_names_below_and_not_the_name() {
        for entry in ["*.example.com", "*.EXAMPLE.com.", "*.example.com:80"] {
            for host in ["a.example.com", "a.b.example.com", "A.Example.Com."] {
                assert!(opens(entry, host, Some(80), "10.0.0.1"), "{entry} {host}");
            }
            for host in ["example.com", ".example.com", "aexample.com", "a.example.com.evil.example", "com", ""] {
                assert!(!opens(entry, host, Some(80), "10.0.0.1"), "{entry} {host}");
            }
        }
    }

    #[test]
    fn a_network_opens_its_addresses_whatever_the_name() {
        for (entry, inside, outside) in [
            ("10.1.2.3", "10.1.2.3", "10.1.2.4"),
            ("10.1.2.3/32", "10.1.2.3", "10.1.2.2"),
            ("10.128.0.0/9", "10.128.0.0", "10.127.255.255"),
            ("10.0.0.0/9", "10.127.255.255", "10.128.0.0"),
            ("169.254.169.254", "169.254.169.254", "169.254.169.253"),
            ("::1", "::1", "::"),
            ("[::1]", "::1", "::2"),
            ("fd00::/8", "fdff:ffff::1", "fc00::1"),
            ("FD00::/8", "fd00::1", "fe00::1"),
            ("fd00::", "fd00::", "fd00::1"),
        ] {
            for host in ["a.example", inside, &format!("[{inside}]")] {
                assert!(opens(entry, host, Some(80), inside), "{entry} {host}");
                assert!(!opens(entry, host, Some(80), outside), "{entry} {host}");
            }
        }
    }

    #[test]
    fn an_ipv4_network_opens_what_carries_its_addresses() {
        for address in ["10.1.2.3", "::ffff:10.1.2.3", "64:ff9b::10.1.2.3"] {
            assert!(reaches("10.0.0.0/8", address), "{address}");
            assert!(reaches("10.1.2.3", address), "{address}");
            assert!(reaches("0.0.0.0/0", address), "{address}");
            assert!(!reaches("10.1.2.4", address), "{address}");
        }
        // The other end of these is not the IPv4 host.
        for address in ["2002:a01:203::1", "::10.1.2.3", "64:ff9b:1::10.1.2.3", "::1", "::", "fd00::1"] {
            assert!(!reaches("0.0.0.0/0", address), "{address}");
        }
    }

    #[test]
    fn an_ipv6_network_opens_what_is_written_in_it() {
        for address in ["::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "::", "::1", "fe80::1", "ff02::1"] {
            assert!(reaches("::/0", address), "{address}");
        }
        assert!(reaches("::ffff:10.0.0.0/104", "::ffff:10.1.2.3"));
        assert!(!reaches("::ffff:10.0.0.0/104", "::ffff:172.16.0.1"));
        assert!(reaches("64:ff9b::/96", "64:ff9b::10.1.2.3"));
        assert!(reaches("2002:a00::/24", "2002:a01:203::1"));
        for address in ["127.0.0.1", "10.1.2.3"] {
            assert!(!reaches("::/0", address), "{address}");
            assert!(!reaches("::ffff:0:0/96", address), "{address}");
        }
    }

    #[test]
    fn a_port_narrows_any_entry() {
        for (entry, host, address) in [
            ("db.example.com", "db.example.com", "10.0.0.1"),
            ("*.example.com", "db.example.com", "10.0.0.1"),
            ("10.0.0.1", "10.0.0.1", "10.0.0.1"),
            ("10.0.0.0/8", "a.example", "10.0.0.1"),
            ("[::1]", "[::1]", "::1"),
            ("[fd00::/8]", "a.example", "fd00::1"),
        ] {
            let opens = |ports: &str, port| opens(&format!("{entry}{ports}"), host, port, address);
            assert!(opens("", None) && opens("", Some(1)) && opens("", Some(0)), "{entry}");
            assert!(opens(":443", Some(443)), "{entry}");
            assert!(!opens(":443", Some(442)) && !opens(":443", Some(444)) && !opens(":443", None), "{entry}");
            assert!(opens(":80-90", Some(80)) && opens(":80-90", Some(90)) && opens(":9-9", Some(9)), "{entry}");
            assert!(!opens(":80-90", Some(79)) && !opens(":80-90", Some(91)) && !opens(":80-90", None), "{entry}");
            assert!(opens(":1-65535", Some(65535)) && !opens(":1-65535", None), "{entry}");
        }
    }

    #[test]
    fn a_list_is_separated_by_commas_and_white_space() {
        for text in ["", "  ", ",", " ,\n,\t"] {
            assert_eq!(Policy::parse(text), Ok(Policy::default()), "{text:?}");
        }
        for text in ["10.0.0.1,[::1]:80", " 10.0.0.1 , [::1]:80, ", "10.0.0.1\n[::1]:80\n", "10.0.0.1\t,,[::1]:80"] {
            assert!(reaches(text, "10.0.0.1") && opens(text, "[::1]", Some(80), "::1"), "{text:?}");
            assert!(!opens(text, "[::1]", Some(81), "::1") && !reaches(text, "10.0.0.2"), "{text:?}");
        }
    }

    #[test]
    fn a_bad_entry_is_named_with_advice() {
        assert_eq!(
            problem("10.0.0.0/8, https://a.example"),
            format!("cannot read \"https://a.example\": write it without the scheme; an entry looks like {EXAMPLES}")
        );
        assert!(Policy::parse(&EXAMPLES.replace(" or ", " ")).is_ok());
        assert!(problem(&"ä".repeat(1000)).len() < 500);
    }

    #[test]
    fn each_bad_entry_is_refused_with_a_reason() {
        // One character more than the longest part, and than the longest name.
        let (label, long) = ("a".repeat(64), format!("{}aa", "a.".repeat(126)));
        assert!(Policy::parse(&label[1..]).is_ok() && Policy::parse(&long[..253]).is_ok());
        for (reason, entries) in [
            ("without the scheme", "http://a.example https://10.0.0.1:80/x HTTP://A"),
            (
                "from 1 to 65535",
                "a:0 a:65536 a:99999999999 a: a:x a:+1 a:-1 a:1- a:1-2-3 a:0-9 a:1-65536 a:80/x [::1]:",
            ),
            ("from 1 to 65535", "10.0.0.1:0 10.0.0.0/8:0 [::1]:0 *.a.example:0 [fd00::/8]:65536 a:\u{0663}"),
            ("port range 9-8 is empty", "a:9-8 10.0.0.0/8:9-8 [::1]:9-8"),
            ("the network is 10.0.0.0/8", "10.1.2.3/8 10.0.0.1/8:80"),
            ("the network is fd00::/8", "fd00::1/8 [fd12::/8]:80"),
            ("the network is 0.0.0.0/0", "1.2.3.4/0"),
            ("number from 0 to 32", "10.0.0.0/33 10.0.0.0/ 10.0.0.0/x 10.0.0.0/255.0.0.0 10.0.0.0/+8 10.0.0.0/8/8"),
            ("number from 0 to 128", "fd00::/129 fd00::/ fd00::/999 [fd00::/x]:80"),
            ("before the / is no IP address", "a.example/x 10/8 10.0/16 010.0.0.0/8 /8 //a.example 0x7f.0.0.0/8"),
            ("stands in brackets", "fd00::/8:443 a:80:90 ::1::2 fe80::1%eth0 12345::1"),
            ("closing bracket", "[::1 [::1:80"),
            ("brackets are for IPv6", "[10.0.0.1] [10.0.0.0/8]:80"),
            ("no IP address", "[a.example] [] [a.example]:80"),
            ("follow the bracket", "[::1]80 [fd00::]/8 [fd00::]/8:80"),
            ("0.0.0.0/0 and ::/0", "* *:443"),
            ("whole of the first part", "*.*.a a.*.b a* *a.example **.a *.*"),
            ("host is missing", ":80 . *. *.:80"),
            ("xn--", "bücher.example *.bücher.example:80"),
            ("cannot contain", "a@b a;b *.a/8 \"a\" a%20b a?b a#b a=b a\\b a'b"),
            ("1 to 63 characters", "a..b .a a.. *..a"),
            ("1 to 63 characters", &label),
            ("at most 253", &long),
            ("hyphen", "-a a- a.-b.c *.a- -"),
            ("dotted address", "2130706433 0x7f.1 127.1 0x7f000001 0X7F.1 0177.0.0.1 127.0.0.01 0x 1.2.3 1.2.3.4.5"),
            ("dotted address", "256.0.0.1 10.0.0.1. 127.1:80 a.example.1 *.1 *.0.0.1 *.0x1f *.10.0.0.1:80 a.0xg.0x"),
        ] {
            for entry in entries.split(' ') {
                let problem = problem(entry);
                assert!(problem.contains(reason), "{reason}: {problem}");
            }
        }
    }
}
