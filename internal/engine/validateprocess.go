package engine

import (
	"fmt"

	"conex/internal/runtime"

	apic "github.com/moby/moby/api/types/container"
)

// ulimitWarnings tells of limits that this machine does not let conex raise: the nearest one that it does is set instead.
func ulimitWarnings(limits []*apic.Ulimit) []string {
	var out []string
	for _, u := range limits {
		l := runtime.Rlimit(u.Name, u.Soft, u.Hard)
		if got := runtime.AllowedRlimit(l); got != l {
			out = append(out, fmt.Sprintf("ulimit %s: the hard limit here is %d and can't be raised without CAP_SYS_RESOURCE: %d:%d is set instead of %d:%d",
				u.Name, got.Hard, got.Soft, got.Hard, u.Soft, u.Hard))
		}
	}
	return out
}
