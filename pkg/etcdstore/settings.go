package etcdstore

import (
	"github.com/ipam-ledger/ipam-ledger/pkg/config"
)

// FromSettings is the Config that settings describe. Files are read when a
// connection is made.
func FromSettings(s config.Settings) Config {
	return Config{
		Endpoints: s.Endpoints, CAFile: s.CAFile, CertFile: s.CertFile, KeyFile: s.KeyFile,
		Username: s.Username, PasswordFile: s.PasswordFile, Exposed: s.Exposed,
	}
}
