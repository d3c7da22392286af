package etcdstore

import (
	"context"
	"fmt"
	"net"
	"strings"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
)

// NewClient returns a client on all endpoints that finds its way back by itself,
// for those who follow etcd for long. Each of its connections is made by Dial,
// so that certificate files, the CA's too, are read anew for each. The rest of
// the client's configuration is base's.
func NewClient(cfg Config, base clientv3.Config) (*clientv3.Client, error) {
	password, err := cfg.password()
	if err != nil {
		return nil, err
	}
	base.Endpoints, base.Username, base.Password = nil, cfg.Username, password
	at := map[string]string{}
	for i, endpoint := range cfg.Endpoints {
		name := authority(endpoint)
		if strings.HasPrefix(endpoint, "unix:") {
			name = fmt.Sprintf("unix-%d", i) // there may be several
		}
		at[name] = endpoint
		base.Endpoints = append(base.Endpoints, "http://"+name) // TLS is Dial's
	}
	if base.Logger == nil {
		base.Logger = zap.NewNop()
	}
	base.DialOptions = append(base.DialOptions, grpc.WithContextDialer(func(ctx context.Context, name string) (net.Conn, error) {
		endpoint, ok := at[name]
		if !ok {
			return nil, fmt.Errorf("%q is no endpoint", name)
		}
		return Dial(ctx, cfg, endpoint)
	}))
	return clientv3.New(base)
}
