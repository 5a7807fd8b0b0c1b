package runtime

import (
	"strings"

	"conex/internal/linux/caps"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Rlimit is Docker's limit, "nofile" from soft to hard, -1 for none, as the OCI spec has it.
func Rlimit(name string, soft, hard int64) specs.POSIXRlimit {
	return specs.POSIXRlimit{Type: "RLIMIT_" + strings.ToUpper(name), Soft: uint64(soft), Hard: uint64(hard)}
}

// AllowedRlimit returns l, or what comes nearest to it where this process may not raise hard limits (setrlimit(2)).
func AllowedRlimit(l specs.POSIXRlimit) specs.POSIXRlimit {
	n, ok := rlimitNumbers[strings.ToUpper(l.Type)]
	if !ok || caps.Available()&(1<<unix.CAP_SYS_RESOURCE) != 0 {
		return l
	}
	var own unix.Rlimit
	if err := unix.Getrlimit(n, &own); err != nil {
		return l // the start will say why
	}
	l.Hard = min(l.Hard, own.Max)
	l.Soft = min(l.Soft, l.Hard)
	return l
}
