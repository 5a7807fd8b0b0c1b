package netlink

import (
	"errors"

	rtnetlink "github.com/vishvananda/netlink"
)

// Dump calls list until what it reports is whole. The kernel says of a list of interfaces, addresses or routes when one of them came or went
// meanwhile (NLM_F_DUMP_INTR), which on a machine that starts containers is every day's; library calls then report ErrDumpInterrupted. A list
// that never comes to rest is the last error.
func Dump[T any](list func() (T, error)) (T, error) {
	v, err := list()
	for n := 0; n < 100 && errors.Is(err, rtnetlink.ErrDumpInterrupted); n++ {
		v, err = list()
	}
	return v, err
}
