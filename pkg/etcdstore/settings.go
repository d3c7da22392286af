package etcdstore

import (
	"fmt"
	"os"
	"strings"

	"github.com/ipam-ledger/ipam-ledger/pkg/config"
)

// FromSettings is the Config that settings describe. It reads the password.
func FromSettings(s config.Settings) (Config, error) {
	c := Config{Endpoints: s.Endpoints, CAFile: s.CAFile, CertFile: s.CertFile, KeyFile: s.KeyFile, Username: s.Username}
	if s.PasswordFile != "" {
		b, err := os.ReadFile(s.PasswordFile)
		if err != nil {
			return Config{}, fmt.Errorf("passwordFile: %w", err)
		}
		c.Password = strings.TrimRight(string(b), "\r\n")
	}
	return c, nil
}
