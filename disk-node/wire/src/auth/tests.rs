#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::*;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use tokio::io::{duplex, DuplexStream};

const SECRET: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

/// What the release of these bytes spoke.
const VERSION_2: VersionRange = VersionRange { min: 2, max: 2 };
/// And the one after it.
const VERSION_3: VersionRange = VersionRange { min: 2, max: 3 };

// Computed with another implementation of HMAC from the description at the top of `auth.rs`: secret and cluster id as
// in `known`, disk meant 33 33 .., client's disk 44 44 .., gateway 55 55 .., client nonce 11 11 .., server nonce
// 22 22 .. .
const CLIENT_HELLO: &str =
    "6772616e6172790000020200070707070707070707070707070707073333333333333333333333333333333344444444444444444444444444444444555555555555555555555555555555551111111111111111111111111111111111111111111111111111111111111111";
const SERVER_HELLO: &str = "6772616e6172790000020000222222222222222222222222222222222222222222222222222222222222222271f4f9730c2663d65f01b306f3ffd1cf3ea668cc95f3ad8642db0374419e6954";
const CLIENT_PROOF: &str = "bc9436aee2ad80cecd64528d91a38671b00fa45fa41a1e1c77cfa31312f444c8";
const ACCEPTED: &str = "00ba94a4a32b7ab8b4d5a5d2e5c6c6794e07b8c8e5b058edcdb7cd3b99f2caa0fb";

// The same of ends that speak versions 2 and 3.
const CLIENT_HELLO_3: &str =
    "6772616e6172790000030201070707070707070707070707070707073333333333333333333333333333333344444444444444444444444444444444555555555555555555555555555555551111111111111111111111111111111111111111111111111111111111111111";
const SERVER_HELLO_3: &str = "6772616e61727900000300012222222222222222222222222222222222222222222222222222222222222222ee13270a6bae91595af48e90d634c557ffaf0d8e70a7ba2c2060758d596c8921";
const CLIENT_PROOF_3: &str = "ba7872d9e1977528207e62470708a6f511d480b134a84a84e1417605e1ed45f9";
const ACCEPTED_3: &str = "0059466ef6da57ecb961435408ceabf0570e86415e9e4c984e17b831f78ff7b119";

// The same of ends that speak versions 2 to 4.
const CLIENT_HELLO_4: &str =
    "6772616e6172790000040202070707070707070707070707070707073333333333333333333333333333333344444444444444444444444444444444555555555555555555555555555555551111111111111111111111111111111111111111111111111111111111111111";
const SERVER_HELLO_4: &str = "6772616e61727900000400022222222222222222222222222222222222222222222222222222222222222222e8477cf2e684e4e6ccb6889df85079f2fb6bd40c6bfccabe5c3d9767bc44ca36";
const CLIENT_PROOF_4: &str = "1bab18c2a108d666fa5c1d98df24f67ac2c43e502bf972637b212542e7cf63b0";
const ACCEPTED_4: &str = "00c4730f1768373fe0f661eb12899bb20ea4ef72424bd9098b278bd6c0aaad3f7a";

/// What ends of these versions say to each other, and the version they use.
const GOLDEN: [(VersionRange, [&str; 4], u16); 3] = [
    (VERSION_2, [CLIENT_HELLO, SERVER_HELLO, CLIENT_PROOF, ACCEPTED], 2),
    (VERSION_3, [CLIENT_HELLO_3, SERVER_HELLO_3, CLIENT_PROOF_3, ACCEPTED_3], 3),
    (PROTOCOL_VERSIONS, [CLIENT_HELLO_4, SERVER_HELLO_4, CLIENT_PROOF_4, ACCEPTED_4], 4),
];

fn known() -> Credentials {
    Credentials { cluster: ClusterId([7; 16]), secret: ClusterSecret::from_hex(SECRET).unwrap() }
}

/// The disk of the golden handshake.
const ME: DiskUuid = DiskUuid([0x33; 16]);

/// Of a client whose place nobody needs.
fn stays() -> CancellationToken {
    CancellationToken::new()
}

fn known_ends() -> Ends {
    Ends { to: Some(ME), from: Some(DiskUuid([0x44; 16])), gateway: Some(GatewayId([0x55; 16])) }
}

/// The session of the golden handshake.
pub(crate) fn known_session() -> Session {
    let mut client_hello = [0; CLIENT_HELLO_BYTES];
    hex::decode_to_slice(CLIENT_HELLO, &mut client_hello).unwrap();
    let mut server_head = [0; SERVER_HEAD_BYTES];
    hex::decode_to_slice(&SERVER_HELLO[..2 * SERVER_HEAD_BYTES], &mut server_head).unwrap();
    Transcript { key: known().secret.key(), client_hello, server_head }.session(2)
}

async fn expect(stream: &mut DuplexStream, golden: &str) {
    let mut bytes = vec![0; golden.len() / 2];
    stream.read_exact(&mut bytes).await.unwrap();
    assert_eq!(hex::encode(bytes), golden);
}

#[tokio::test]
async fn a_client_says_the_golden_bytes() {
    for (versions, [client_hello, server_hello, client_proof, accepted], version) in GOLDEN {
        let (mut ours, mut theirs) = duplex(1024);
        let server = tokio::spawn(async move {
            expect(&mut theirs, client_hello).await;
            theirs.write_all(&hex::decode(server_hello).unwrap()).await.unwrap();
            expect(&mut theirs, client_proof).await;
            theirs.write_all(&hex::decode(accepted).unwrap()).await.unwrap();
        });
        let purpose = (Purpose::Control, known_ends());
        let session = client_handshake(&mut ours, &known(), purpose, versions, [0x11; 32]).await.unwrap();
        server.await.unwrap();
        assert_eq!(session.version, version);
        let is_known = session.to_server.mac(&[b"x"]) == known_session().to_server.mac(&[b"x"]);
        assert_eq!(is_known, versions == VERSION_2, "other hellos, other keys");
        assert_ne!(session.to_server.mac(&[b"x"]), session.to_client.mac(&[b"x"]));
    }
}

#[tokio::test]
async fn a_server_says_the_golden_bytes() {
    for (versions, [client_hello, server_hello, client_proof, accepted], version) in GOLDEN {
        let (mut ours, mut theirs) = duplex(1024);
        let client = tokio::spawn(async move {
            theirs.write_all(&hex::decode(client_hello).unwrap()).await.unwrap();
            expect(&mut theirs, server_hello).await;
            theirs.write_all(&hex::decode(client_proof).unwrap()).await.unwrap();
            expect(&mut theirs, accepted).await;
        });
        let caller = server_handshake(&mut ours, &known(), ME, versions, [0x22; 32], stays(), |_| true).await.unwrap();
        client.await.unwrap();
        assert_eq!((caller.purpose, caller.disk), (Purpose::Control, known_ends().from));
        assert_eq!((caller.gateway, caller.session.version), (known_ends().gateway, version));
        let is_known = caller.session.to_client.mac(&[b"x"]) == known_session().to_client.mac(&[b"x"]);
        assert_eq!(is_known, versions == VERSION_2, "other hellos, other keys");
    }
}

/// Runs both ends against each other.
async fn meet(client: Credentials, server: Credentials) -> (Result<Session, LinkError>, Result<Caller, LinkError>) {
    let (mut ours, mut theirs) = duplex(1024);
    tokio::join!(
        async move {
            client_handshake(&mut ours, &client, (Purpose::Data, known_ends()), VERSION_2, nonce().unwrap()).await
        },
        async move { server_handshake(&mut theirs, &server, ME, VERSION_2, nonce().unwrap(), stays(), |_| true).await }
    )
}

#[tokio::test]
async fn another_secret_is_refused_on_both_sides() {
    let other = Credentials { secret: ClusterSecret::generate().unwrap(), ..known() };
    let (client, server) = meet(other, known()).await;
    assert_eq!(client.unwrap_err(), LinkError::Auth(AuthError::Secret));
    assert_eq!(server.unwrap_err(), LinkError::Auth(AuthError::Secret));
}

#[tokio::test]
async fn another_cluster_is_refused_on_both_sides() {
    let other = Credentials { cluster: ClusterId([8; 16]), ..known() };
    let (client, server) = meet(other, known()).await;
    assert_eq!(client.unwrap_err(), LinkError::Auth(AuthError::Cluster));
    assert_eq!(server.unwrap_err(), LinkError::Auth(AuthError::Cluster));
}

/// What a client that means disk `to` makes of the disk [`ME`], and whom the server takes it for.
async fn meet_for(
    to: Option<DiskUuid>,
    from: Option<DiskUuid>,
) -> (Result<(), LinkError>, Result<Option<DiskUuid>, LinkError>) {
    let (mut ours, mut theirs) = duplex(1024);
    let (credentials, ends) = (known(), Ends { to, from, gateway: None });
    let (client, server) = tokio::join!(
        client_handshake(&mut ours, &credentials, (Purpose::Data, ends), VERSION_2, [0x11; 32]),
        server_handshake(&mut theirs, &credentials, ME, VERSION_2, [0x22; 32], stays(), |_| true)
    );
    (client.map(|_| ()), server.map(|caller| caller.disk))
}

#[tokio::test]
async fn a_client_that_means_another_disk_is_refused_on_both_sides() {
    let other = DiskUuid([0x34; 16]);
    let error = LinkError::Auth(AuthError::Disk);
    assert_eq!(meet_for(Some(other), None).await, (Err(error.clone()), Err(error)));
    assert_eq!(meet_for(Some(ME), Some(other)).await, (Ok(()), Ok(Some(other))));
    assert_eq!(meet_for(None, None).await, (Ok(()), Ok(None)), "whoever answers");
}

#[tokio::test]
async fn a_client_that_skips_the_proof_of_the_server_gains_nothing() {
    for proof in [[0u8; 32], [0xff; 32]] {
        let (mut ours, mut theirs) = duplex(1024);
        let attacker = async move {
            theirs.write_all(&hex::decode(CLIENT_HELLO).unwrap()).await.unwrap();
            let mut hello = [0; 76];
            theirs.read_exact(&mut hello).await.unwrap();
            theirs.write_all(&proof).await.unwrap();
            let mut verdict = [0; 1];
            theirs.read_exact(&mut verdict).await.unwrap();
            verdict[0]
        };
        let credentials = known();
        let (verdict, server) = tokio::join!(
            attacker,
            server_handshake(&mut ours, &credentials, ME, VERSION_2, [0x22; 32], stays(), |_| true)
        );
        assert_eq!(verdict, 3);
        assert_eq!(server.unwrap_err(), LinkError::Auth(AuthError::Secret));
    }
}

#[tokio::test]
async fn the_servers_own_proof_is_not_a_proof_of_the_client() {
    let (mut ours, mut theirs) = duplex(1024);
    let attacker = async move {
        theirs.write_all(&hex::decode(CLIENT_HELLO).unwrap()).await.unwrap();
        let mut hello = [0; 76];
        theirs.read_exact(&mut hello).await.unwrap();
        theirs.write_all(&hello[44..]).await.unwrap();
    };
    let credentials = known();
    let (_, server) =
        tokio::join!(attacker, server_handshake(&mut ours, &credentials, ME, VERSION_2, [0x22; 32], stays(), |_| true));
    assert_eq!(server.unwrap_err(), LinkError::Auth(AuthError::Secret));
}

#[tokio::test]
async fn a_client_whose_place_is_needed_hears_that_the_node_is_busy_wherever_it_stands() {
    let hello = hex::decode(CLIENT_HELLO).unwrap();
    for sent in [0, PREFIX_BYTES, CLIENT_HELLO_BYTES] {
        let (mut ours, mut theirs) = duplex(1024);
        let turned_out = stays();
        let client = async {
            theirs.write_all(&hello[..sent]).await.unwrap();
            let mut greeting = [0; 76];
            if sent == CLIENT_HELLO_BYTES {
                theirs.read_exact(&mut greeting).await.unwrap();
            } else {
                tokio::task::yield_now().await;
            }
            turned_out.cancel();
            let mut verdict = [0; PREFIX_BYTES];
            if sent == CLIENT_HELLO_BYTES {
                theirs.read_exact(&mut verdict[10..11]).await.unwrap();
            } else {
                theirs.read_exact(&mut verdict).await.unwrap();
            }
            verdict[10]
        };
        let credentials = known();
        let serving =
            server_handshake(&mut ours, &credentials, ME, VERSION_2, [0x22; 32], turned_out.clone(), |_| true);
        let (verdict, server) = tokio::join!(client, serving);
        assert_eq!((verdict, server.unwrap_err()), (Verdict::Busy.number(), LinkError::Busy), "after {sent} bytes");
    }
}

#[tokio::test]
async fn a_verdict_about_disks_is_not_believed_before_a_proof() {
    for verdict in [Verdict::Secret, Verdict::Disk] {
        let (mut ours, mut theirs) = duplex(1024);
        theirs.write_all(&prefix(VERSION_2, verdict.number())).await.unwrap();
        let purpose = (Purpose::Control, known_ends());
        let answer = client_handshake(&mut ours, &known(), purpose, VERSION_2, [0x11; 32]).await;
        assert!(matches!(answer, Err(LinkError::Protocol(_))), "{:?}", answer.err());
    }
}

/// Stands between a client and a server: passes on `to_server` bytes of what the client says and `to_client` bytes of
/// what the server says, and says `forged` after these. Never ends.
async fn pass_on(client: DuplexStream, server: DuplexStream, to_server: usize, to_client: usize, forged: &[u8]) {
    let (from_client, mut at_client) = tokio::io::split(client);
    let (from_server, mut at_server) = tokio::io::split(server);
    let (there, back) =
        tokio::join!(async { tokio::io::copy(&mut from_client.take(to_server as u64), &mut at_server).await }, async {
            tokio::io::copy(&mut from_server.take(to_client as u64), &mut at_client).await?;
            at_client.write_all(forged).await
        });
    there.and(back).unwrap();
    std::future::pending().await
}

/// What a client makes of a node that somebody stands before; see [`pass_on`].
async fn meet_through(
    to_server: usize,
    to_client: usize,
    forged: &[u8],
    turned_out: CancellationToken,
    place: bool,
) -> Result<Session, LinkError> {
    let ((mut ours, before_client), (before_server, mut theirs)) = (duplex(1024), duplex(1024));
    let credentials = known();
    let purpose = (Purpose::Control, known_ends());
    let client = client_handshake(&mut ours, &credentials, purpose, VERSION_2, [0x11; 32]);
    let server = async {
        let served =
            server_handshake(&mut theirs, &credentials, ME, VERSION_2, [0x22; 32], turned_out, |_| place).await;
        // Nobody hangs up before the client has made up its mind.
        std::future::pending::<()>().await;
        served
    };
    let between = pass_on(before_client, before_server, to_server, to_client, forged);
    tokio::select! {
        session = client => session,
        _ = server => unreachable!(),
        () = between => unreachable!(),
    }
}

#[tokio::test]
async fn a_verdict_that_was_forged_after_the_proof_is_not_believed() {
    let hello = SERVER_HEAD_BYTES + PROOF_BYTES;
    let real = meet_through(usize::MAX, usize::MAX, &[], stays(), true).await;
    assert!(real.is_ok(), "{:?}", real.err());
    for verdict in [Verdict::Accepted, Verdict::Secret, Verdict::Busy, Verdict::Disk] {
        // No code; the code of the real verdict, which is "accepted"; the code that another connection would have.
        let mut of_this = hex::decode(ACCEPTED).unwrap();
        of_this[0] = verdict.number();
        let elsewhere = Transcript {
            key: known().secret.key(),
            client_hello: [0; CLIENT_HELLO_BYTES],
            server_head: [0; SERVER_HEAD_BYTES],
        };
        let of_another = elsewhere.session(2).verdict(verdict);
        let codes: [&[u8]; 3] = [&[[verdict.number()].as_slice(), &[0; 32]].concat(), &of_this, &of_another];
        for (which, forged) in codes.into_iter().enumerate() {
            let made = meet_through(usize::MAX, hello, forged, stays(), true).await.map(|_| ());
            let honest = verdict == Verdict::Accepted && which == 1;
            let expected = if honest { Ok(()) } else { Err(LinkError::Auth(AuthError::Message)) };
            assert_eq!(made, expected, "{verdict:?}, code {which}");
        }
    }
}

/// The server says "wrong secret", and with its code: the proof that it saw was another. The client knows its secret to
/// be right, for the server has just proved that it has the same.
#[tokio::test]
async fn a_proof_that_was_altered_on_its_way_is_not_taken_for_a_wrong_secret() {
    let ((mut ours, before_client), (before_server, mut theirs)) = (duplex(1024), duplex(1024));
    let between = async {
        let (from_client, mut at_client) = tokio::io::split(before_client);
        let (mut from_server, mut at_server) = tokio::io::split(before_server);
        let there = async {
            let mut hello = from_client.take(CLIENT_HELLO_BYTES as u64);
            tokio::io::copy(&mut hello, &mut at_server).await?;
            let mut proof = [0; PROOF_BYTES];
            hello.into_inner().read_exact(&mut proof).await?;
            proof[7] ^= 1;
            at_server.write_all(&proof).await
        };
        tokio::try_join!(there, tokio::io::copy(&mut from_server, &mut at_client)).unwrap();
        // Nobody hangs up before the client has made up its mind.
        std::future::pending::<()>().await;
    };
    let credentials = known();
    let purpose = (Purpose::Control, known_ends());
    let ends = async {
        tokio::join!(
            client_handshake(&mut ours, &credentials, purpose, PROTOCOL_VERSIONS, [0x11; 32]),
            server_handshake(&mut theirs, &credentials, ME, PROTOCOL_VERSIONS, [0x22; 32], stays(), |_| true)
        )
    };
    let (client, server) = tokio::select! { met = ends => met, () = between => unreachable!() };
    assert_eq!(client.map(|_| ()), Err(LinkError::Auth(AuthError::Message)));
    assert_eq!(server.unwrap_err(), LinkError::Auth(AuthError::Secret));
}

#[tokio::test]
async fn a_client_hears_that_a_node_is_busy_at_each_step_of_the_handshake() {
    let everything = usize::MAX;
    for (step, to_server, place) in [
        ("before its hello", 0, true),
        ("in the middle of its hello", PREFIX_BYTES, true),
        ("before its proof", CLIENT_HELLO_BYTES, true),
        ("after its proof", everything, false),
    ] {
        let turned_out = stays();
        let meeting = meet_through(to_server, everything, &[], turned_out.clone(), place);
        let later = async {
            // The server has read all that comes by then, and waits for more.
            for _ in 0..100 {
                tokio::task::yield_now().await;
            }
            turned_out.cancel();
            std::future::pending::<()>().await;
        };
        let heard = async {
            tokio::select! { heard = meeting => heard, () = later => unreachable!() }
        };
        let heard = tokio::time::timeout(crate::test_support::DEADLINE, heard).await.expect(step);
        assert_eq!(heard.err(), Some(LinkError::Busy), "{step}");
    }
    let (mut ours, mut theirs) = duplex(1024);
    refuse_busy(&mut theirs).await;
    let purpose = (Purpose::Control, known_ends());
    let heard = client_handshake(&mut ours, &known(), purpose, VERSION_2, [0x11; 32]).await;
    assert_eq!(heard.err(), Some(LinkError::Busy), "at its arrival");
}

#[tokio::test]
async fn a_recorded_handshake_is_not_good_for_a_second_connection() {
    let (mut ours, mut theirs) = duplex(1024);
    theirs.write_all(&hex::decode(CLIENT_HELLO).unwrap()).await.unwrap();
    theirs.write_all(&hex::decode(CLIENT_PROOF).unwrap()).await.unwrap();
    let server = server_handshake(&mut ours, &known(), ME, VERSION_2, nonce().unwrap(), stays(), |_| true).await;
    assert_eq!(server.unwrap_err(), LinkError::Auth(AuthError::Secret));
}

#[tokio::test]
async fn every_altered_byte_of_a_handshake_is_noticed() {
    // Bytes 8, 9 and 11 are the versions; those that are only in the transcript count most.
    for at in 0..CLIENT_HELLO_BYTES {
        let (mut ours, mut theirs) = duplex(1024);
        let mut hello = hex::decode(CLIENT_HELLO).unwrap();
        hello[at] ^= 1;
        theirs.write_all(&hello).await.unwrap();
        theirs.write_all(&hex::decode(CLIENT_PROOF).unwrap()).await.unwrap();
        assert!(
            server_handshake(&mut ours, &known(), ME, VERSION_2, [0x22; 32], stays(), |_| true).await.is_err(),
            "byte {at}"
        );
    }
    for at in 0..76 {
        let (mut ours, mut theirs) = duplex(1024);
        let mut hello = hex::decode(SERVER_HELLO).unwrap();
        hello[at] ^= 1;
        theirs.write_all(&hello).await.unwrap();
        theirs.write_all(&hex::decode(ACCEPTED).unwrap()).await.unwrap();
        assert!(
            client_handshake(&mut ours, &known(), (Purpose::Control, known_ends()), VERSION_2, [0x11; 32])
                .await
                .is_err(),
            "byte {at}"
        );
    }
}

fn versions(min: u16, max: u16) -> VersionRange {
    VersionRange { min, max }
}

/// Runs ends of these versions against each other; what the client and the server made of it.
async fn meet_as(client: VersionRange, server: VersionRange) -> [Result<u16, LinkError>; 2] {
    let (mut ours, mut theirs) = duplex(1024);
    let credentials = known();
    let (client, server) = tokio::join!(
        client_handshake(&mut ours, &credentials, (Purpose::Data, known_ends()), client, [0x11; 32]),
        server_handshake(&mut theirs, &credentials, ME, server, [0x22; 32], stays(), |_| true)
    );
    [client.map(|session| session.version), server.map(|caller| caller.session.version)]
}

#[tokio::test]
async fn ends_use_the_highest_version_that_both_speak() {
    for (client, server, common) in [
        (versions(1, 1), versions(1, 1), 1),
        (versions(1, 3), versions(2, 5), 3),
        (versions(2, 5), versions(1, 3), 3),
        (versions(1, 9), versions(4, 4), 4),
        (versions(300, 555), versions(1, 300), 300),
    ] {
        assert_eq!(meet_as(client, server).await, [Ok(common), Ok(common)], "{client} and {server}");
    }
}

#[tokio::test]
async fn ends_without_a_common_version_say_so_to_each_other() {
    for (client, server) in [(versions(3, 5), versions(1, 2)), (versions(1, 1), versions(2, 300))] {
        // No end can say more than 255 older versions.
        let said = |range: VersionRange| versions(range.min.max(range.max.saturating_sub(255)), range.max);
        let error = |ours, theirs| Err(LinkError::Auth(AuthError::Version { ours, theirs: said(theirs) }));
        assert_eq!(meet_as(client, server).await, [error(client, server), error(server, client)]);
    }
    let error = AuthError::Version { ours: versions(3, 5), theirs: versions(2, 2) };
    let text =
        "the peer speaks version 2 of the node protocol, this end speaks versions 3 to 5: upgrade the older of the two";
    assert_eq!(error.to_string(), text);
}

#[tokio::test]
async fn a_refusal_for_the_version_is_the_golden_bytes() {
    let (mut ours, mut theirs) = duplex(1024);
    let mut hello = hex::decode(CLIENT_HELLO).unwrap();
    hello[9] = 3;
    theirs.write_all(&hello).await.unwrap();
    let server = server_handshake(&mut ours, &known(), ME, VERSION_2, [0x22; 32], stays(), |_| true).await;
    let (two, three) = (versions(2, 2), versions(3, 3));
    assert_eq!(server.unwrap_err(), LinkError::Auth(AuthError::Version { ours: two, theirs: three }));
    expect(&mut theirs, "6772616e6172790000020100").await;
}

#[tokio::test]
async fn a_stranger_is_told_apart_from_a_peer() {
    let (mut ours, mut theirs) = duplex(1024);
    theirs.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    assert_eq!(
        server_handshake(&mut ours, &known(), ME, VERSION_2, [0x22; 32], stays(), |_| true).await.unwrap_err(),
        LinkError::Auth(AuthError::Magic)
    );
}

#[test]
fn keys_of_any_length_give_the_hmac_of_the_standard() {
    // RFC 4231, test cases 2 and 6: a short key and one longer than a block.
    let short = MacKey::new(b"Jefe").mac(&[b"what do ya want ", b"for nothing?"]);
    assert_eq!(hex::encode(short), "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
    let long = MacKey::new(&[0xaa; 131]).mac(&[b"Test Using Larger Than Block-Size Key - Hash Key First"]);
    assert_eq!(hex::encode(long), "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54");
}

#[test]
fn secrets_do_not_show_in_debug_output() {
    let shown = format!("{:?} {:?}", known(), known_session());
    assert!(!shown.contains("0001") && !shown.contains("0, 1, 2") && shown.contains("redacted"), "{shown}");
}

fn secret_file(text: &str, mode: u32) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file.as_file().set_permissions(std::fs::Permissions::from_mode(mode)).unwrap();
    file
}

#[test]
fn a_secret_file_must_be_private_and_long_enough() {
    let read = |text: &str, mode| {
        let file = secret_file(text, mode);
        ClusterSecret::read_file(file.path()).map_err(|error| error.to_string())
    };
    assert_eq!(read(&format!("{SECRET}\n"), 0o600).unwrap().to_hex(), SECRET);
    assert_eq!(read(SECRET, 0o400).unwrap().to_hex(), SECRET);
    for mode in [0o640, 0o604, 0o620, 0o660, 0o666, 0o610] {
        let error = read(SECRET, mode).unwrap_err();
        assert!(error.contains("chmod 600"), "{mode:o}: {error}");
    }
    assert!(read("", 0o600).unwrap_err().contains("fewer than 32"));
    assert!(read(&SECRET[2..], 0o600).unwrap_err().contains("31 bytes"));
    assert!(read(&SECRET.replace('0', "g"), 0o600).unwrap_err().contains("hexadecimal"));
    assert!(read(&SECRET.repeat(100), 0o600).unwrap_err().contains("larger than"));
    let missing = ClusterSecret::read_file(Path::new("/no/such/secret")).unwrap_err().to_string();
    assert!(missing.contains("/no/such/secret"), "{missing}");
}

#[test]
fn generated_secrets_differ() {
    assert_ne!(ClusterSecret::generate().unwrap().to_hex(), ClusterSecret::generate().unwrap().to_hex());
}
