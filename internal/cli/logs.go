package cli

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"conex/internal/engine"
)

func (a *app) logsCommand() *cobra.Command {
	var req engine.LogsRequest
	var since, until, tail string
	cmd := &cobra.Command{
		Use: "logs [OPTIONS] CONTAINER", Short: "Fetch the logs of a container", Args: a.exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			now := time.Now()
			var err error
			if req.Since, err = parseTime(since, now); err != nil {
				return a.usageError(cmd, fmt.Errorf("invalid value for \"since\": %w", err))
			}
			if req.Until, err = parseTime(until, now); err != nil {
				return a.usageError(cmd, fmt.Errorf("invalid value for \"until\": %w", err))
			}
			req.Tail = -1
			if n, err := strconv.Atoi(tail); err == nil && n >= 0 {
				req.Tail = n
			} else if err != nil && tail != "all" {
				return a.usageError(cmd, fmt.Errorf("invalid value for \"tail\": %q is neither a number nor \"all\"", tail))
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			ctx, stop := a.interruptible(cmd.Context())
			defer stop()
			req.Container, req.Stdout, req.Stderr = args[0], a.out, a.err
			return e.Logs(ctx, req)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&req.Details, "details", false, "Show extra details provided to logs")
	f.BoolVarP(&req.Follow, "follow", "f", false, "Follow log output")
	f.StringVar(&since, "since", "", `Show logs since timestamp (e.g. "2013-01-02T13:23:37Z") or relative (e.g. "42m" for 42 minutes)`)
	f.StringVarP(&tail, "tail", "n", "all", "Number of lines to show from the end of the logs")
	f.BoolVarP(&req.Timestamps, "timestamps", "t", false, "Show timestamps")
	f.StringVar(&until, "until", "", `Show logs before a timestamp (e.g. "2013-01-02T13:23:37Z") or relative (e.g. "42m" for 42 minutes)`)
	return cmd
}

// parseTime reads what --since and --until take: a duration before now, a date with as much of a time as one likes (local unless it
// names a zone), or seconds since 1970 with a fraction. "" is the zero time.
func parseTime(s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	if d, err := time.ParseDuration(s); err == nil {
		return now.Add(-d), nil
	}
	if sec, frac, _ := strings.Cut(s, "."); len(sec) > 0 && len(frac) <= 9 {
		n, err := strconv.ParseInt(sec, 10, 64)
		if err == nil {
			nano := int64(0)
			if frac != "" {
				if nano, err = strconv.ParseInt(frac, 10, 64); err != nil {
					return time.Time{}, fmt.Errorf("failed to parse value as time or duration: %q", s)
				}
				nano *= int64(math.Pow10(9 - len(frac)))
			}
			return time.Unix(n, nano), nil
		}
	}
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15:04:05.999999999", "2006-01-02T15:04", "2006-01-02T15", "2006-01-02Z07:00", "2006-01-02"} {
		if t, err := time.ParseInLocation(layout, s, time.Local); err == nil {
			return t, nil
		}
	}
	return time.Time{}, fmt.Errorf("failed to parse value as time or duration: %q", s)
}
