package resolver

import (
	"cmp"
	"errors"
	"io/fs"
	"net/netip"
	"slices"
	"sync"

	"conex/internal/disk"
)

// Servers returns the name servers that the host itself asks at this moment, and reads its file only when it has changed. The zero value is
// ready. Safe for several goroutines.
type Servers struct {
	// File and Systemd are the host's files instead of HostFile and systemd-resolved's.
	File, Systemd string

	mu         sync.Mutex
	host, real snapshot
}

// snapshot is a file as it was read last.
type snapshot struct {
	stamp   disk.Stamp
	servers []netip.Addr
}

// Current returns the servers in the order of the file; an address may have a zone. All of them are meant for programs on the host, loopback
// addresses too. Behind systemd-resolved's stub, which knows best who is to be asked about which domain, its own servers follow, for a
// stub that does not answer.
func (s *Servers) Current() ([]netip.Addr, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	list, err := s.host.read(cmp.Or(s.File, HostFile))
	if err != nil || !slices.Contains(list, netip.AddrFrom4([4]byte{127, 0, 0, 53})) {
		return list, err
	}
	more, err := s.real.read(cmp.Or(s.Systemd, systemdFile))
	if err != nil {
		return nil, err
	}
	return slices.Concat(list, more), nil
}

// read returns the file's servers; one that does not exist has none.
func (s *snapshot) read(file string) ([]netip.Addr, error) {
	stamp, err := disk.StampOf(file)
	if errors.Is(err, fs.ErrNotExist) {
		*s = snapshot{}
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if s.stamp.Still(stamp) {
		return s.servers, nil
	}
	p, err := read(file)
	if err != nil {
		return nil, err
	}
	s.stamp, s.servers = stamp, nil
	for _, a := range p.servers {
		if a, err := netip.ParseAddr(a); err == nil && !slices.Contains(s.servers, a) {
			s.servers = append(s.servers, a)
		}
	}
	return s.servers, nil
}
