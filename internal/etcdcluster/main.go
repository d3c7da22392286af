package etcdcluster

import (
	"fmt"
	"os"
	"strings"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

// memberEnv marks a process that is to be a member.
const memberEnv = "ETCDCLUSTER_MEMBER"

// Main runs etcd, and never returns, in a process that Start made; in others it
// does nothing. Call it before anything else.
func Main() {
	if os.Getenv(memberEnv) == "" {
		return
	}
	os.Unsetenv(memberEnv)
	if len(os.Args) < 2 || !strings.HasPrefix(os.Args[1], "--name=") {
		fmt.Fprintf(os.Stderr, "etcd member: %s is set, and the arguments are no member's: %q\n", memberEnv, os.Args)
		os.Exit(1)
	}
	if err := superviseSync(); err != nil {
		// Without the filter it is a member all the same.
		fmt.Fprintf(os.Stderr, "etcd member: its disk cannot be slowed down: %v\n", err)
	}
	os.Args[0] = "etcd"
	etcdmain.Main(os.Args)
	os.Exit(0)
}
