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
    for host in ["example.com", "x.db.example.com", "xdb.example.com", "db.example.com.evil.example", "", "10.0.0.1"] {
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
        ("from 1 to 65535", "a:0 a:65536 a:99999999999 a: a:x a:+1 a:-1 a:1- a:1-2-3 a:0-9 a:1-65536 a:80/x [::1]:"),
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
