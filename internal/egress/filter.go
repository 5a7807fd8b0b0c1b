package egress

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"conex/internal/linux/netlink"
)

// ErrUnsupported says that the kernel can't hold a filter that others can't take away.
var ErrUnsupported = errors.New("--egress needs Linux 6.9 or newer, with nftables on interfaces (CONFIG_NF_TABLES_NETDEV, CONFIG_NETFILTER_EGRESS)")

// Options say what a filter lets pass.
type Options struct {
	// Interface is the host's end of the container's veth. It exists and is down yet.
	Interface string
	// MAC and Addrs are the container's own; nothing leaves with others.
	MAC   net.HardwareAddr
	Addrs []netip.Addr
	// Link6 are the prefixes on the link, where neighbours are asked for.
	Link6 []netip.Prefix
	List  List
	// Group is the netfilter log group that is told of what was denied; 0 for none.
	Group uint16
	// Learnt are names that were looked up before, Flows what others began before: both of a container that runs already.
	Learnt Learnt
	Flows  []Flow
	// turn is which of two names the sets of this list have; see Change.
	turn bool
}

// turned is the name of a set that another list has another for, but for its family.
func (o Options) turned(set string) string {
	if o.turn {
		return set + "-"
	}
	return set
}

// Filter is a filter that stands. It belongs to the process that made it until Close; if that process dies, the filter stays.
type Filter struct {
	mu    sync.Mutex
	c     *netlink.Conn
	table string
	o     Options
}

func tableName(iface string) string { return "conex-" + iface }

// Install makes the filter of an interface, in one transaction. What an earlier owner left under the name is replaced.
func Install(o Options) (*Filter, error) {
	if err := Remove(o.Interface); err != nil {
		return nil, err
	}
	msgs, err := messages(o)
	if err != nil {
		return nil, err
	}
	c, err := netlink.Dial(unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, err
	}
	if err := c.Transaction(unix.NFNL_SUBSYS_NFTABLES, msgs...); err != nil {
		c.Close()
		if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) {
			return nil, fmt.Errorf("%w (%w)", ErrUnsupported, err)
		}
		return nil, fmt.Errorf("make egress filter of %s: %w", o.Interface, err)
	}
	o.Learnt, o.Flows = nil, nil
	return &Filter{c: c, table: tableName(o.Interface), o: o}, nil
}

// Close gives the filter up; it stays until Remove.
func (f *Filter) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.c == nil {
		return nil
	}
	err := f.c.Close()
	f.c = nil
	return err
}

// How long the addresses of a name are kept, at least and beyond what its answer says, and at most.
const (
	minNameTime   = time.Minute
	nameTimeSlack = 30 * time.Second
	maxNameTime   = 24 * time.Hour
)

// Forever is the time of what a hosts file says.
const Forever = time.Duration(-1)

// Hold is how long the way to a name's addresses stays open when its answer holds for ttl; 0 is forever.
func Hold(ttl time.Duration) time.Duration {
	if ttl == Forever {
		return 0
	}
	return min(max(ttl, minNameTime)+nameTimeSlack, maxNameTime)
}

// Learn opens the way to the addresses that a name has for so long, as far as the list names it. It returns when they can be reached.
func (f *Filter) Learn(name string, addrs []netip.Addr, ttl time.Duration) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.c == nil {
		return nil
	}
	keys := keys{}
	for _, a := range addrs {
		keys.name(f.o, name, a)
	}
	var msgs []netlink.Message
	for set, ks := range keys {
		// Made anew, since an element that is there keeps its time.
		msgs = append(msgs, elements(destroySetElem, 0, f.table, set, ks, nil, 0), elements(unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE, f.table, set, ks, nil, Hold(ttl)))
	}
	if len(msgs) == 0 {
		return nil
	}
	if err := f.c.Transaction(unix.NFNL_SUBSYS_NFTABLES, msgs...); err != nil {
		return fmt.Errorf("open the way to %s: %w", name, err)
	}
	return nil
}

// destroySetElem is NFT_MSG_DESTROYSETELEM: a deletion that does not mind what is missing.
const destroySetElem = 30

// Remove deletes the filter of an interface that nobody owns any more. It is no error when there is none.
func Remove(iface string) error {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER)
	if err != nil {
		return err
	}
	defer c.Close()
	err = c.Transaction(unix.NFNL_SUBSYS_NFTABLES, message(unix.NFT_MSG_DELTABLE, 0, netlink.Attrs{}.String(unix.NFTA_TABLE_NAME, tableName(iface))))
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove egress filter of %s: %w", iface, err)
	}
	return nil
}

// Interfaces lists those that have a filter, or had one when they were there.
func Interfaces() ([]string, error) {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	tables, err := c.Dump(message(unix.NFT_MSG_GETTABLE, 0, nil))
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EAFNOSUPPORT) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list egress filters: %w", err)
	}
	var out []string
	for _, t := range tables {
		if len(t) < 4 {
			continue
		}
		name := strings.TrimRight(string(netlink.Parse(t[4:])[unix.NFTA_TABLE_NAME]), "\x00")
		if iface, ok := strings.CutPrefix(name, tableName("")); ok && t[0] == unix.NFPROTO_NETDEV {
			out = append(out, iface)
		}
	}
	return out, nil
}

// Attempt is what a container tried to reach and was denied.
type Attempt struct {
	Addr netip.Addr
	// Proto is a protocol's name or number, Port 0 where it has none.
	Proto string
	Port  uint16
	// Packets were dropped within the last hour.
	Packets uint64
}

// Denied lists what the filter of an interface has dropped lately, most packets first. It is empty without a filter.
func Denied(iface string) ([]Attempt, error) {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	var out []Attempt
	for _, s := range sides {
		a := netlink.Attrs{}.String(unix.NFTA_SET_ELEM_LIST_TABLE, tableName(iface)).String(unix.NFTA_SET_ELEM_LIST_SET, "denied"+s.suffix)
		replies, err := c.Dump(message(unix.NFT_MSG_GETSETELEM, 0, a))
		if errors.Is(err, unix.ENOENT) {
			return nil, nil
		}
		if err != nil {
			return nil, fmt.Errorf("list what was denied on %s: %w", iface, err)
		}
		for _, r := range replies {
			if len(r) < 4 {
				continue
			}
			netlink.Each(netlink.Parse(r[4:])[unix.NFTA_SET_ELEM_LIST_ELEMENTS], func(_ uint16, b []byte) {
				el := netlink.Parse(b)
				key := netlink.Parse(el[unix.NFTA_SET_ELEM_KEY])[unix.NFTA_DATA_VALUE]
				addr, ok := netip.AddrFromSlice(key[:min(len(key), int(s.size))])
				if !ok || len(key) < int(s.size)+8 {
					return
				}
				rest := key[s.size:]
				// The counter counts what comes after its element was made.
				counter := netlink.Parse(netlink.Parse(el[unix.NFTA_SET_ELEM_EXPR])[unix.NFTA_EXPR_DATA])[unix.NFTA_COUNTER_PACKETS]
				at := Attempt{Addr: addr, Proto: protoName(rest[0]), Port: binary.BigEndian.Uint16(rest[4:])}
				if len(counter) == 8 {
					at.Packets = binary.BigEndian.Uint64(counter)
				}
				out = append(out, at)
			})
		}
	}
	slices.SortStableFunc(out, func(a, b Attempt) int {
		switch {
		case a.Packets != b.Packets:
			return int(int64(b.Packets) - int64(a.Packets))
		default:
			return a.Addr.Compare(b.Addr)
		}
	})
	return out, nil
}

func protoName(p byte) string {
	for name, n := range protocols {
		if n == p {
			return name
		}
	}
	switch p {
	case unix.IPPROTO_ICMP:
		return "icmp"
	case unix.IPPROTO_ICMPV6:
		return "icmpv6"
	}
	return fmt.Sprint(p)
}
