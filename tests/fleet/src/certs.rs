//! A certificate authority in a directory, and the certificates of a fleet.
//!
//! One authority vouches for everybody; every certificate carries one DNS name (the engine's id, `coordinator` or
//! `operator`), by which the other side is verified, and is good for both ends of a connection.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use baton_proto::EngineId;
use baton_proto::ids::{IdError, RESERVED_NAMES};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use time::{Duration, OffsetDateTime};

/// Days for which an authority is valid.
pub const AUTHORITY_DAYS: u32 = 3650;

/// Days for which a certificate is valid where nothing else is said.
pub const DEFAULT_DAYS: u32 = 365;

/// A certificate that could not be made. Causes are in the chain of sources, not in the text.
#[derive(Debug, thiserror::Error)]
pub enum CertError {
    /// It is there already.
    #[error("{} exists: choose another directory or name, or replace it with --force", .0.display())]
    Exists(PathBuf),
    /// There is no authority in the directory.
    #[error("no certificate authority in {}: make one with `baton certs init {}`", .0.display(), .0.display())]
    NoAuthority(PathBuf),
    /// A name that no part of a fleet can have.
    #[error("certificate name")]
    Name(#[from] IdError),
    /// A validity that ends before it begins, or after the authority's.
    #[error("--days {0}: use 1 to {AUTHORITY_DAYS}")]
    Days(u32),
    /// A file that cannot be read or written.
    #[error("{}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A key or certificate that does not parse, or could not be signed.
    #[error("{}", path.display())]
    Crypto {
        /// The file it is in, or was to go to.
        path: PathBuf,
        /// What is wrong with it.
        source: rcgen::Error,
    },
}

/// A certificate authority: `ca.pem` and `ca.key` of a directory.
pub struct Authority {
    dir: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

/// Where a certificate was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issued {
    /// The certificate, PEM.
    pub cert: PathBuf,
    /// Its private key, PEM, readable by its owner only.
    pub key: PathBuf,
}

impl Authority {
    /// Makes a new authority in `dir`, which is made where missing. An authority that is there already is
    /// replaced only where `force` says so: every certificate it issued is then void.
    pub fn init(dir: &Path, force: bool) -> Result<Self, CertError> {
        fs::create_dir_all(dir).map_err(|source| CertError::Io { path: dir.to_owned(), source })?;
        let paths = Issued { cert: dir.join("ca.pem"), key: dir.join("ca.key") };
        let crypto = |source| CertError::Crypto { path: paths.cert.clone(), source };

        let key = KeyPair::generate().map_err(crypto)?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "Baton fleet authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        set_validity(&mut params, AUTHORITY_DAYS);
        let cert = params.self_signed(&key).map_err(crypto)?;

        write_pair(&paths, &cert.pem(), &key.serialize_pem(), force)?;
        Ok(Self { dir: dir.to_owned(), issuer: Issuer::new(params, key) })
    }

    /// Opens the authority that [`Authority::init`] made in `dir`.
    pub fn load(dir: &Path) -> Result<Self, CertError> {
        let read = |path: &Path| match fs::read_to_string(path) {
            Ok(text) => Ok(text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(CertError::NoAuthority(dir.to_owned()))
            }
            Err(source) => Err(CertError::Io { path: path.to_owned(), source }),
        };
        let (cert_path, key_path) = (dir.join("ca.pem"), dir.join("ca.key"));
        let (cert, key) = (read(&cert_path)?, read(&key_path)?);
        let key = KeyPair::from_pem(&key).map_err(|source| CertError::Crypto { path: key_path, source })?;
        let issuer = Issuer::from_ca_cert_pem(&cert, key)
            .map_err(|source| CertError::Crypto { path: cert_path, source })?;
        Ok(Self { dir: dir.to_owned(), issuer })
    }

    /// Writes a new key and a certificate for `name` (an engine id, `coordinator` or `operator`) beside the
    /// authority. A pair that is there already is replaced only where `force` says so.
    pub fn issue(&self, name: &str, days: u32, force: bool) -> Result<Issued, CertError> {
        if !RESERVED_NAMES.contains(&name) {
            name.parse::<EngineId>()?;
        }
        if !(1..=AUTHORITY_DAYS).contains(&days) {
            return Err(CertError::Days(days));
        }
        let paths =
            Issued { cert: self.dir.join(format!("{name}.pem")), key: self.dir.join(format!("{name}.key")) };
        let crypto = |source| CertError::Crypto { path: paths.cert.clone(), source };

        let key = KeyPair::generate().map_err(crypto)?;
        let mut params = CertificateParams::new([name.to_owned()]).map_err(crypto)?;
        params.distinguished_name.push(DnType::CommonName, name);
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        set_validity(&mut params, days);
        let cert = params.signed_by(&key, &self.issuer).map_err(crypto)?;

        write_pair(&paths, &cert.pem(), &key.serialize_pem(), force)?;
        Ok(paths)
    }
}

/// Valid from an hour ago, since clocks in a fleet differ.
fn set_validity(params: &mut CertificateParams, days: u32) {
    let now = OffsetDateTime::now_utc();
    params.not_before = now - Duration::HOUR;
    params.not_after = now + Duration::days(i64::from(days));
}

/// Writes both files or neither: a certificate whose key is another one's is the worst to find out.
fn write_pair(paths: &Issued, cert: &str, key: &str, force: bool) -> Result<(), CertError> {
    let old = [&paths.cert, &paths.key].into_iter().find(|path| path.symlink_metadata().is_ok());
    if let (Some(old), false) = (old, force) {
        return Err(CertError::Exists(old.clone()));
    }
    let staged_key = stage(&paths.key, key, 0o600)?;
    let staged_cert = stage(&paths.cert, cert, 0o644)?;
    for (from, to) in [(staged_key, &paths.key), (staged_cert, &paths.cert)] {
        fs::rename(&from, to).map_err(|source| CertError::Io { path: to.clone(), source })?;
    }
    Ok(())
}

/// Writes a file beside `path`, to be renamed to it.
fn stage(path: &Path, text: &str, mode: u32) -> Result<PathBuf, CertError> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let staged = path.with_file_name(name);
    let write = || -> io::Result<()> {
        // A leftover of an earlier attempt may have another mode.
        if let Err(error) = fs::remove_file(&staged)
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(error);
        }
        let mut file: File = OpenOptions::new().write(true).create_new(true).mode(mode).open(&staged)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    write().map_err(|source| CertError::Io { path: staged.clone(), source })?;
    Ok(staged)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn keys_are_private_and_nothing_is_overwritten_unasked() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::init(dir.path(), false).unwrap();
        let issued = authority.issue("e0", 30, false).unwrap();
        let before = fs::read(&issued.key).unwrap();
        assert_eq!(fs::metadata(&issued.key).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(dir.path().join("ca.key")).unwrap().permissions().mode() & 0o777, 0o600);

        assert!(matches!(authority.issue("e0", 30, false), Err(CertError::Exists(_))));
        assert!(matches!(Authority::init(dir.path(), false), Err(CertError::Exists(_))));
        assert_eq!(fs::read(&issued.key).unwrap(), before);

        Authority::load(dir.path()).unwrap().issue("e0", 30, true).unwrap();
        assert_ne!(fs::read(&issued.key).unwrap(), before);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 4);
    }

    #[test]
    fn names_and_days_are_checked() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::init(dir.path(), false).unwrap();
        for name in ["", "../x", "A", "a.b"] {
            assert!(matches!(authority.issue(name, 30, false), Err(CertError::Name(_))), "{name:?}");
        }
        for days in [0, AUTHORITY_DAYS + 1] {
            assert!(matches!(authority.issue("e0", days, false), Err(CertError::Days(_))));
        }
        for name in RESERVED_NAMES {
            authority.issue(name, 1, false).unwrap();
        }
    }

    #[test]
    fn no_authority_is_said_so() {
        let dir = tempfile::tempdir().unwrap();
        let error = Authority::load(dir.path()).err().unwrap().to_string();
        assert!(error.contains("baton certs init"), "{error}");
    }
}
