package logs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"conex/internal/disk"

	"golang.org/x/sys/unix"
)

// journalSocket is where systemd's journal listens; see https://systemd.io/JOURNAL_NATIVE_PROTOCOL.
var journalSocket = "/run/systemd/journal/socket"

// journalSink sends messages to systemd's journal, with the fields that Docker's have.
type journalSink struct {
	patience
	conn *net.UnixConn
	// fields are those that all messages have.
	fields []byte
	epoch  string
	count  uint64
	buf    []byte
}

func openJournal(c Container, tag string, attrs map[string]string) (*journalSink, error) {
	s := &journalSink{epoch: disk.RandomID()}
	if err := s.dial(); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil, errors.New("journald is not enabled on this host")
		}
		return nil, err
	}
	for _, f := range [][2]string{
		{"CONTAINER_ID", c.ID()}, {"CONTAINER_ID_FULL", c.FullID()}, {"CONTAINER_NAME", c.Name()}, {"CONTAINER_TAG", tag},
		{"IMAGE_NAME", c.ImageName()}, {"SYSLOG_IDENTIFIER", tag}, {"CONTAINER_LOG_EPOCH", s.epoch},
	} {
		s.fields = appendField(s.fields, f[0], []byte(f[1]))
	}
	for k, v := range attrs {
		if k = fieldName(k); k != "" {
			s.fields = appendField(s.fields, k, []byte(v))
		}
	}
	return s, nil
}

func (s *journalSink) dial() error {
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: journalSocket, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("journald: %w", err)
	}
	s.conn = conn
	return nil
}

func (s *journalSink) redial() error {
	old := s.conn
	if err := s.dial(); err != nil {
		return err
	}
	return old.Close()
}

// fieldName makes a journal's field of a label's or a variable's name: capitals, digits and underscores, which it doesn't begin with.
func fieldName(name string) string {
	name = strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z':
			return r - 'a' + 'A'
		case r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
			return r
		}
		return '_'
	}, name)
	return strings.TrimLeft(name, "_")
}

// appendField appends a field; a value with a line's end in it is preceded by its length.
func appendField(b []byte, name string, value []byte) []byte {
	b = append(b, name...)
	for _, c := range value {
		if c == '\n' {
			b = append(b, '\n')
			b = binary.LittleEndian.AppendUint64(b, uint64(len(value)))
			return append(append(b, value...), '\n')
		}
	}
	return append(append(append(b, '='), value...), '\n')
}

func (s *journalSink) send(m message) error {
	if s.over() {
		return nil
	}
	if s.pause > 0 {
		s.pause = 0
		if note := s.note(); note != "" {
			if err := s.send(message{line: []byte(note), stderr: true, t: m.t}); err != nil {
				return err
			}
		}
	}
	b := append(s.buf[:0], s.fields...)
	priority := "6"
	if m.stderr {
		priority = "3"
	}
	s.count++
	b = appendField(b, "PRIORITY", []byte(priority))
	b = appendField(b, "SYSLOG_TIMESTAMP", m.t.UTC().AppendFormat(nil, time.RFC3339Nano))
	b = appendField(b, "CONTAINER_LOG_ORDINAL", strconv.AppendUint(nil, s.count, 10))
	if m.id != "" {
		b = appendField(b, "CONTAINER_PARTIAL_ID", []byte(m.id))
		b = appendField(b, "CONTAINER_PARTIAL_ORDINAL", strconv.AppendInt(nil, int64(m.ordinal), 10))
		b = appendField(b, "CONTAINER_PARTIAL_LAST", strconv.AppendBool(nil, m.last))
		if !m.last {
			b = appendField(b, "CONTAINER_PARTIAL_MESSAGE", []byte("true"))
		}
	}
	b = appendField(b, "MESSAGE", m.line)
	s.buf = b
	err := s.write(b)
	if err != nil && !isTimeout(err) { // the journal was started anew
		if derr := s.redial(); derr != nil {
			err = derr
		} else {
			err = s.write(b)
		}
	}
	if err != nil {
		s.failed(1)
	}
	return err
}

func (s *journalSink) write(b []byte) error {
	if err := s.conn.SetWriteDeadline(time.Now().Add(sendTimeout)); err != nil {
		return fmt.Errorf("journald: %w", err)
	}
	_, err := s.conn.Write(b)
	if errors.Is(err, unix.EMSGSIZE) || errors.Is(err, unix.ENOBUFS) {
		err = s.writeFile(b)
	}
	if err != nil {
		return fmt.Errorf("journald: %w", err)
	}
	return nil
}

// writeFile sends what is too long for a message as a sealed file in memory.
func (s *journalSink) writeFile(b []byte) error {
	fd, err := unix.MemfdCreate("journal-entry", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), "journal-entry")
	defer f.Close()
	if _, err := f.Write(b); err != nil {
		return err
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE|unix.F_SEAL_SEAL); err != nil {
		return err
	}
	rights := unix.UnixRights(int(f.Fd()))
	rc, err := s.conn.SyscallConn()
	if err != nil {
		return err
	}
	// The net package sends no descriptors over a datagram socket that is connected.
	werr := rc.Write(func(fd uintptr) bool {
		err = unix.Sendmsg(int(fd), nil, rights, nil, unix.MSG_NOSIGNAL)
		return !errors.Is(err, unix.EAGAIN)
	})
	return errors.Join(werr, err)
}

func (s *journalSink) flush() error { return nil }

func (s *journalSink) close() error { return s.conn.Close() }
