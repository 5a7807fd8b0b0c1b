package netlink

import (
	"errors"
	"fmt"
	"testing"

	rtnetlink "github.com/vishvananda/netlink"
)

func TestDump(t *testing.T) {
	cut := fmt.Errorf("list: %w", rtnetlink.ErrDumpInterrupted)
	other := errors.New("no")
	for _, c := range []struct {
		interrupted int
		end         error
		calls       int
		err         error
	}{{0, nil, 1, nil}, {3, nil, 4, nil}, {2, other, 3, other}, {1 << 20, nil, 101, cut}} {
		calls := 0
		v, err := Dump(func() (int, error) {
			calls++
			if calls <= c.interrupted {
				return 0, cut
			}
			return 7, c.end
		})
		if calls != c.calls || err != c.err || err == nil && v != 7 {
			t.Errorf("%d interrupted: %d calls, %d, %v", c.interrupted, calls, v, err)
		}
	}
}
