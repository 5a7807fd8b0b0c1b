package logs

import (
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/docker/go-units"
)

// ErrUnsupported says that a driver or option doesn't exist here; the text names it.
var ErrUnsupported = errors.New("not supported")

// The names of the drivers.
const (
	Local    = "local"
	JSONFile = "json-file"
	Journald = "journald"
	Syslog   = "syslog"
	None     = "none"
)

// elsewhere says of a driver of Docker's that conex doesn't have what to use instead; "" of any other.
func elsewhere(driver string) string {
	switch driver {
	case "fluentd":
		return "fluentd and Fluent Bit read the driver syslog (their input syslog) and journald (systemd)"
	case "gelf":
		return "Graylog reads the driver syslog (its inputs Syslog UDP and TCP)"
	case "awslogs":
		return "Amazon's CloudWatch agent reads the driver journald"
	case "splunk":
		return "Splunk reads the driver syslog"
	case "gcplogs":
		return "Google's ops agent reads the driver journald"
	case "logentries":
		return "its service is gone"
	case "etwlogs":
		return "it is Windows's"
	}
	return ""
}

// FileOptions are those of a log's files.
type FileOptions struct {
	// MaxSize is the size in bytes at which a file is full; negative means never.
	MaxSize int64
	// MaxFile is how many files there may be, the current one among them.
	MaxFile int
	// Compress says that full files are compressed.
	Compress bool
}

// Options are a log's parsed options.
type Options struct {
	// Driver is one of the drivers' names.
	Driver string
	// Files bounds the log's files, or those of the copy that a driver keeps which sends the output away.
	Files FileOptions
	// NonBlocking says that output which comes faster than it can be written is dropped, up to MaxBuffer bytes being held.
	NonBlocking bool
	MaxBuffer   int
	// Tag is a template, empty for the driver's own.
	Tag string
	// Labels, LabelsRegex, Env and EnvRegex choose what is logged of a container's labels and environment.
	Labels, Env           []string
	LabelsRegex, EnvRegex string
	// CacheDisabled says that a driver which sends the output away keeps no copy.
	CacheDisabled bool
	// Syslog is set with the driver syslog.
	Syslog SyslogOptions
}

// SyslogOptions say where messages go, and how they look.
type SyslogOptions struct {
	// Network and Address are as net.Dial wants them, with "tcp+tls" besides; both empty mean this machine's syslog.
	Network, Address string
	Facility         int
	// Format is "rfc3164", "rfc5424", "rfc5424micro", or empty for that of a machine's own syslog.
	Format            string
	CACert, Cert, Key string
	SkipVerify        bool
}

// Cached says that the driver sends the output away and keeps a copy.
func (o Options) Cached() bool {
	return (o.Driver == Syslog || o.Driver == Journald) && !o.CacheDisabled
}

// Readable says that there is something to read.
func (o Options) Readable() bool { return o.Driver == Local || o.Driver == JSONFile || o.Cached() }

// String describes the bounds for people.
func (o Options) String() string {
	what := o.Driver
	switch {
	case !o.Readable():
		return what
	case o.Cached():
		what += " and a copy"
	}
	if o.Files.MaxSize < 0 {
		return what + ", unbounded"
	}
	s := fmt.Sprintf("%s, at most %d files of %s", what, o.Files.MaxFile, units.BytesSize(float64(o.Files.MaxSize)))
	if o.Files.Compress {
		s += ", full ones compressed"
	}
	return s
}

// known says whether a driver has an option; the names are Docker's. A default driver has to take what another default one takes, so "local"
// has attributes too.
func known(driver, option string) bool {
	switch option {
	case "mode", "max-buffer-size", "cache-disabled", "cache-max-size", "cache-max-file", "cache-compress",
		"tag", "labels", "labels-regex", "env", "env-regex":
		return true
	case "max-size", "max-file", "compress":
		return driver == Local || driver == JSONFile
	case "syslog-address", "syslog-facility", "syslog-format", "syslog-tls-ca-cert", "syslog-tls-cert", "syslog-tls-key", "syslog-tls-skip-verify":
		return driver == Syslog
	}
	return false
}

// ParseOptions checks a driver's name ("" is local) and Docker's --log-opt: mode (blocking or non-blocking), max-buffer-size (1m); for
// files max-size (20m unless given, -1 for no bound), max-file (5), compress (true), with "cache-" before them for the copy of a driver that
// sends the output away; tag, labels, env and their expressions; syslog's.
func ParseOptions(driver string, opts map[string]string) (Options, error) {
	o := Options{Driver: driver, Files: FileOptions{MaxSize: 20 << 20, MaxFile: 5, Compress: true}, MaxBuffer: 1 << 20}
	switch driver {
	case "":
		o.Driver = Local
	case None:
		if len(opts) > 0 {
			return o, errors.New("invalid logging opts for driver none")
		}
		return o, nil
	}
	switch o.Driver {
	case Local, JSONFile, Journald, Syslog:
	default:
		if why := elsewhere(driver); why != "" {
			return o, fmt.Errorf("log driver %q: %w: %s", driver, ErrUnsupported, why)
		}
		return o, fmt.Errorf("log driver %q: %w, there are %s, %s, %s, %s and %s", driver, ErrUnsupported, Journald, JSONFile, Local, Syslog, None)
	}
	for _, k := range slices.Sorted(maps.Keys(opts)) {
		if !known(o.Driver, k) {
			return o, fmt.Errorf("unknown log opt '%s' for %s log driver", k, o.Driver)
		}
	}
	switch mode := opts["mode"]; mode {
	case "", "blocking":
		if _, ok := opts["max-buffer-size"]; ok {
			return o, errors.New("logger: max-buffer-size option is only supported with 'mode=non-blocking'")
		}
	case "non-blocking":
		o.NonBlocking = true
	default:
		return o, fmt.Errorf("logger: logging mode not supported: %s", mode)
	}
	for _, k := range slices.Sorted(maps.Keys(opts)) {
		if err := o.set(k, opts[k]); err != nil {
			return o, fmt.Errorf("log option %s=%s: %w", k, opts[k], err)
		}
	}
	if o.Driver == Syslog {
		if err := o.Syslog.parse(opts); err != nil {
			return o, err
		}
	}
	return o, nil
}

// set sets one option that is known to the driver.
func (o *Options) set(k, v string) (err error) {
	cached := o.Driver == Syslog || o.Driver == Journald
	name, cache := strings.CutPrefix(k, "cache-")
	if cache && !cached { // there is no copy to speak of
		return nil
	}
	switch name {
	case "max-buffer-size":
		var n int64
		if n, err = units.RAMInBytes(v); err == nil && (n < maxLine || n > 1<<30) {
			err = errors.New("must be between 16k and 1g")
		}
		o.MaxBuffer = int(n)
	case "max-size":
		if v == "-1" {
			o.Files.MaxSize = -1
		} else if o.Files.MaxSize, err = units.RAMInBytes(v); err == nil && o.Files.MaxSize <= 0 {
			err = errors.New("must be positive, or -1 for no bound")
		}
	case "max-file":
		if o.Files.MaxFile, err = strconv.Atoi(v); err == nil && o.Files.MaxFile < 1 {
			err = errors.New("must be at least 1")
		}
	case "compress":
		o.Files.Compress, err = strconv.ParseBool(v)
	case "disabled":
		o.CacheDisabled, err = strconv.ParseBool(v)
	case "tag":
		o.Tag = v
		_, err = parseTag(v)
	case "labels":
		o.Labels = strings.Split(v, ",")
	case "env":
		o.Env = strings.Split(v, ",")
	case "labels-regex":
		o.LabelsRegex = v
		_, err = regexp.Compile(v)
	case "env-regex":
		o.EnvRegex = v
		_, err = regexp.Compile(v)
	}
	return err
}

// facilities are syslog's, in the order of their numbers.
var facilities = []string{"kern", "user", "mail", "daemon", "auth", "syslog", "lpr", "news", "uucp", "cron", "authpriv", "ftp",
	"", "", "", "", "local0", "local1", "local2", "local3", "local4", "local5", "local6", "local7"}

func (s *SyslogOptions) parse(opts map[string]string) error {
	s.Facility = 3 // daemon
	if v := opts["syslog-facility"]; v != "" {
		n, err := strconv.Atoi(v)
		if s.Facility = slices.Index(facilities, v); err == nil && n >= 0 && n <= 23 {
			s.Facility = n
		}
		if s.Facility < 0 {
			return errors.New("invalid syslog facility")
		}
	}
	switch s.Format = opts["syslog-format"]; s.Format {
	case "", "rfc3164", "rfc5424", "rfc5424micro":
	default:
		return errors.New("Invalid syslog format") //nolint:staticcheck // Docker's words
	}
	if addr := opts["syslog-address"]; addr != "" {
		if err := s.setAddress(addr); err != nil {
			return err
		}
	}
	s.CACert, s.Cert, s.Key = opts["syslog-tls-ca-cert"], opts["syslog-tls-cert"], opts["syslog-tls-key"]
	if v, ok := opts["syslog-tls-skip-verify"]; ok {
		var err error
		if s.SkipVerify, err = strconv.ParseBool(v); err != nil {
			return fmt.Errorf("log option syslog-tls-skip-verify=%s: %w", v, err)
		}
	}
	if s.Network == "tcp+tls" {
		_, err := s.tls()
		return err
	}
	return nil
}
