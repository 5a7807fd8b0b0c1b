package dns

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// TestLearn: who is bounded asks for listed names alone, and the addresses are learnt before the answer comes.
func TestLearn(t *testing.T) {
	u := newUpstream(t, "127.0.0.1:53", nil, func(_ string, q []byte) [][]byte {
		var m dnsmessage.Message
		must(m.Unpack(q))
		name := m.Questions[0].Name
		target := dnsmessage.MustNewName("target.example.")
		m.Response, m.RecursionAvailable, m.Additionals = true, true, nil
		m.Answers = []dnsmessage.Resource{
			{Header: dnsmessage.ResourceHeader{Name: name, Class: dnsmessage.ClassINET, TTL: 30}, Body: &dnsmessage.CNAMEResource{CNAME: target}},
			{Header: dnsmessage.ResourceHeader{Name: target, Class: dnsmessage.ClassINET, TTL: 60}, Body: &dnsmessage.AResource{A: [4]byte{192, 0, 2, 7}}},
			{Header: dnsmessage.ResourceHeader{Name: target, Class: dnsmessage.ClassINET, TTL: 90}, Body: &dnsmessage.AAAAResource{AAAA: netip.MustParseAddr("2001:db8::7").As16()}},
		}
		b, err := m.Pack()
		must(err)
		return [][]byte{b}
	})
	var learnt []string
	var refuse error
	w := newWorld(t, Config{
		Host: hosts("127.0.0.1"),
		Asks: func(name string) bool { return name == "good.example" },
		Learn: func(name string, addrs []netip.Addr, hold time.Duration) error {
			learnt = append(learnt, fmt.Sprintf("%s %v %s", name, addrs, hold))
			return refuse
		},
	})
	for _, network := range []string{"udp", "tcp"} {
		learnt = nil
		if got := w.query(network, "Good.Example.", dnsmessage.TypeA, 0); got != "Success *dnsmessage.CNAMEResource 192.0.2.7 2001:db8::7" {
			t.Errorf("%s: %s", network, got)
		}
		if len(learnt) != 1 || learnt[0] != "good.example [192.0.2.7 2001:db8::7] 1m30s" {
			t.Errorf("%s: learnt %v", network, learnt)
		}
		u.questions()
		for _, name := range []string{"bad.example.", "x.good.example.", "secret.data.attacker.example.", "7.2.0.192.in-addr.arpa.", "."} {
			if got := w.query(network, name, dnsmessage.TypeTXT, 0); got != "NameError" {
				t.Errorf("%s, %s: %s", network, name, got)
			}
		}
		if got := u.questions(); got != "" {
			t.Errorf("the server was asked for %s", got)
		}
	}
	refuse = errors.New("no")
	if got := w.query("udp", "good.example.", dnsmessage.TypeA, 0); got != "ServerFailure" {
		t.Errorf("without a way: %s", got)
	}
}
