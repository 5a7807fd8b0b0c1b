package engine

import "testing"

func TestParseNetDev(t *testing.T) {
	const text = `Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo: 1000       10    0    0    0     0          0         0     2000      10    0    0    0     0       0          0
  eth0: 5010      40    0    0    0     0          0         0      300      13    0    0    0     0       0          0
eth1:7 1 0 0 0 0 0 0 8 1 0 0 0 0 0 0
 bad: 1 2
`
	if rx, tx := parseNetDev(text); rx != 5017 || tx != 308 {
		t.Errorf("%d, %d", rx, tx)
	}
	if rx, tx := parseNetDev(""); rx != 0 || tx != 0 {
		t.Errorf("nothing: %d, %d", rx, tx)
	}
}
